"""What one frontend knows of all workers' caches and loads, and the choices made from it.

Brings the index, the loads and the overlap check together behind the few words that the router needs: an
instance came up, said something, went away; choose for this request; this attempt was sent.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from penstock.core.costs import EXPECTED_OUTPUT_TOKENS, OutputLengths
from penstock.core.disagg import Disagg
from penstock.core.hashing import root_hash, sequence_hashes
from penstock.core.overlap_check import OverlapCheck, Verdict
from penstock.core.pairing import kv_format, unpaired
from penstock.core.policy import Candidate, Decision, Path, Plan, Query, choose
from penstock.core.prefix_index import PrefixIndex, most_blocks
from penstock.core.worker_load import WorkerLoad
from penstock.errors import ProtocolError
from penstock.shapes import Attempt, Card, Handoff, Load, Request


@dataclass(slots=True, eq=False)
class Placed:
    """One request's standing in the books."""

    request: Request
    hashes: dict[int, list[int]] = field(default_factory=dict)  # by block size
    overlap_tokens: dict[str, int] = field(default_factory=dict)  # by instance, as of the last choice
    booked_on: str = ""  # the decode worker promised to it, while a prefill worker has it
    runs_on: str = ""  # where its current attempt is
    predicted_tokens: int | None = None  # cached there, as foreseen; None when there is nothing to check


class Placement:
    """Pure, but for its random generator, which breaks ties."""

    def __init__(self, policy: str, disagg: str, rng: random.Random, max_itl_ms: float = 0.0) -> None:
        self._policy = policy
        self._disagg = disagg
        self._max_itl_ms = max_itl_ms
        self._rng = rng
        self.index = PrefixIndex()
        self.loads: dict[str, WorkerLoad] = {}  # of the connected instances
        self.overlap_check = OverlapCheck()
        self._cards: dict[str, Card] = {}  # theirs
        self._lengths = OutputLengths()
        self._ordinal = 0

    # --- what instances say -------------------------------------------------------------------------

    def snapshot(self, instance_id: str, hashes: Sequence[int], *, first: bool) -> None:
        """A part of what an instance that is being connected has cached; the first part begins anew."""
        if first:
            self.index.add_worker(instance_id)
            self.index.cleared(instance_id)
        self.index.stored(instance_id, hashes)

    def up(self, card: Card, load: Load) -> None:
        """An instance is connected; what it has cached was told before."""
        self._cards[card.instance_id] = card
        self.index.add_worker(card.instance_id)
        self.loads[card.instance_id] = WorkerLoad(load)

    def down(self, instance_id: str) -> None:
        """Everything known of it is void."""
        self._cards.pop(instance_id, None)
        self.loads.pop(instance_id, None)
        self.index.remove_worker(instance_id)
        self.overlap_check.forget(instance_id)

    def cache_changed(
        self, instance_id: str, stored: Sequence[int], removed: Sequence[int], cleared: bool
    ) -> None:
        """One step's KV events. Raises ProtocolError when they do not fit to those before, or to the
        instance's pool: the index has lost its worth then, and only a new snapshot restores it."""
        if cleared:
            self.index.cleared(instance_id)
        if removed:
            gone = self.index.removed(instance_id, removed)
            if gone < len(removed):
                unknown = len(removed) - gone
                raise ProtocolError(
                    f"step.removed: {unknown} blocks that were not stored, or were removed twice"
                )
        if stored:
            self.index.stored(instance_id, stored)
            held = self.index.held(instance_id)
            most = most_blocks(self._cards[instance_id].engine.total_blocks)
            if held > most:
                raise ProtocolError(f"step.stored: {held} blocks are cached, expected {most} at most")

    def reported(self, instance_id: str, seen: int, load: Load) -> None:
        """Its load, which includes every attempt up to `seen`."""
        self.loads[instance_id].report(seen, load)

    def load(self, instance_id: str) -> Load:
        """The load that the instance itself last reported."""
        known = self.loads.get(instance_id)
        return known.reported if known is not None else Load()

    def requests(self, instance_id: str) -> int:
        """How many attempts it has, whoever sent them: as last reported, and on their way."""
        known = self.loads.get(instance_id)
        return known.requests if known is not None else 0

    def unpaired(self, cards: Sequence[Card]) -> dict[str, str]:
        """As in core/pairing.py; nobody where no prefill worker is to be used."""
        return {} if self._disagg == Disagg.NEVER else unpaired(cards)

    def forget_model(self, model: str) -> None:
        """Nobody serves this model any more."""
        self._lengths.forget(model)

    # --- a request ----------------------------------------------------------------------------------

    def choose(
        self, placed: Placed, tokens: list[int], cards: list[Card], handoff: Handoff | None
    ) -> Decision | None:
        """Choose among these instances for a prompt (with what was generated of it so far).

        `handoff`: its KV is ready on a prefill worker, so only a decode worker that reads it is needed.
        Where there is none, the decision is as if it were not. None: none of them can. `book` follows when
        the decision is acted on.
        """
        self.unbook(placed)  # of an earlier decision: it must not see itself in the load
        self._ordinal += 1
        query = Query(
            prompt_tokens=len(tokens),
            ordinal=self._ordinal,
            expected_output_tokens=self.expected_output_tokens(placed.request),
            handed=kv_format(handoff) if handoff is not None else None,
            max_itl_ms=self._max_itl_ms,
        )
        candidates = self._candidates(placed, tokens, cards)
        return choose(query, candidates, policy=self._policy, disagg=self._disagg, rng=self._rng)

    def book(self, placed: Placed, decision: Decision, tokens: list[int]) -> None:
        """The decode worker of a disaggregated request is booked until `sent`, `unbook` or `ended`."""
        if decision.prefill is not None:
            placed.booked_on = decision.decode
            self.loads[decision.decode].book(placed.request.request_id, len(tokens))

    def _candidates(self, placed: Placed, tokens: list[int], cards: list[Card]) -> list[Candidate]:
        overlaps = {
            size: self.index.overlaps(_hashes(placed, tokens, size))
            for size in {card.engine.block_size for card in cards}
        }
        candidates = []
        for card in cards:
            overlap = overlaps[card.engine.block_size].get(card.instance_id, 0)
            if placed.request.sampling.prompt_logprobs is not None:
                overlap = 0  # its prompt is computed whole, whatever is cached
            # An engine computes the last token again at least, and with it that token's block.
            found = min(overlap, (len(tokens) - 1) // card.engine.block_size)
            placed.overlap_tokens[card.instance_id] = found * card.engine.block_size
            load = self.loads[card.instance_id]
            candidates.append(
                Candidate(
                    instance_id=card.instance_id,
                    role=card.role,
                    load=load.assumed(),
                    block_size=card.engine.block_size,
                    overlap_blocks=overlap if self.overlap_check.trusted(card.instance_id) else 0,
                    max_running=card.engine.max_running,
                    prompt_tokens=load.prompt_tokens,
                    # It knows best itself, once some have ended there.
                    output_tokens=load.reported.output_tokens or load.output_tokens,
                    kv_format=kv_format(card.engine),
                )
            )
        return candidates

    def sent(self, placed: Placed, instance_id: str, seq: int, attempt: Attempt) -> None:
        """An attempt left for this instance as number `seq` on its link."""
        tokens = len(attempt.token_ids)
        overlap = min(placed.overlap_tokens.get(instance_id, 0), tokens - 1)
        have = overlap if attempt.handoff is None else max(overlap, attempt.handoff.num_tokens)
        output_tokens = self.expected_output_tokens(placed.request)
        self.loads[instance_id].send(seq, max(1, tokens - have), tokens, output_tokens)
        if placed.booked_on == instance_id:
            self.unbook(placed)
        placed.runs_on = instance_id
        # What the engine reports after a handoff includes the blocks it pulled: not the index's doing.
        checkable = attempt.handoff is None and attempt.sampling.prompt_logprobs is None
        placed.predicted_tokens = overlap if checkable else None

    def ended(self, placed: Placed, output_tokens: int | None) -> None:
        """The request wants nothing more. None: its output was cut short, which says nothing of lengths."""
        self.unbook(placed)
        if placed.runs_on and output_tokens is not None:
            request = placed.request
            prior = self._usual_output_tokens(request.model.name)
            self._lengths.ended(request.model.name, request.tenant, output_tokens, prior)

    def expected_output_tokens(self, request: Request) -> float:
        """How long its output will be, going by its tenant's others, or by what workers report of all."""
        mean = self._lengths.mean(request.model.name, request.tenant)
        if mean is None:
            mean = self._usual_output_tokens(request.model.name)
        return min(mean, request.sampling.max_tokens)

    def _usual_output_tokens(self, model: str) -> float:
        loads = [load.reported for it, load in self.loads.items() if self._cards[it].model.name == model]
        lengths = [load.output_tokens for load in loads if load.output_tokens]
        return fmean(lengths) if lengths else EXPECTED_OUTPUT_TOKENS

    def unbook(self, placed: Placed) -> None:
        """No instance is promised to it any more."""
        load = self.loads.get(placed.booked_on)
        if load is not None:
            load.release(placed.request.request_id)
        placed.booked_on = ""

    def cached(
        self, placed: Placed, instance_id: str, cached_tokens: int
    ) -> tuple[int, Verdict | None] | None:
        """An engine reports how much of the prompt it had cached. Returns what was predicted and, when
        the trust in that instance's events changes, why; None when there is nothing to compare."""
        predicted = placed.predicted_tokens
        if predicted is None or placed.runs_on != instance_id:
            return None
        placed.predicted_tokens = None
        size = self._cards[instance_id].engine.block_size
        known = predicted
        if (
            cached_tokens > predicted
        ):  # the blocks of an earlier request with this prefix may have come since
            overlap = self.index.overlaps(placed.hashes.get(size, ())).get(instance_id, 0)
            known = max(predicted, min(cached_tokens, overlap * size))
        verdict = self.overlap_check.observe(
            instance_id, known, cached_tokens, size, held_blocks=self.index.held(instance_id)
        )
        return predicted, verdict


def _hashes(placed: Placed, tokens: list[int], block_size: int) -> list[int]:
    """The block hashes of a prompt, computed once per request (again only if it grew by a block)."""
    hashes = placed.hashes.get(block_size)
    if hashes is None or len(hashes) != len(tokens) // block_size:
        root = root_hash(placed.request.model.name, placed.request.cache_salt)
        hashes = placed.hashes[block_size] = sequence_hashes(tokens, block_size, root)
    return hashes


def explain(request_id: str, decision: Decision, avoided: Collection[str] = ()) -> str:
    """The decision and what each candidate would have cost, on one line."""
    line = (
        f"routing decision: request={request_id} path={decision.path} decode={decision.decode} "
        f"prefill={decision.prefill or '-'} candidates=" + " ".join(map(_explain_one, decision.plans))
    )
    return f"{line} avoided={','.join(sorted(avoided))}" if avoided else line


def _explain_one(plan: Plan) -> str:
    here = plan.here
    terms = {
        "queue": plan.queue_ms,
        "prefill": plan.prefill_ms,
        "inflicted": plan.inflicted_ms,
        "transfer": plan.transfer_ms,
        "decode": here.decode_ms,
        "total": plan.total_ms,
    }
    if plan.other_start_ms is not None:  # why this path: what the first token costs by either
        other = Path.LOCAL if plan.path is Path.REMOTE else Path.REMOTE
        terms |= {plan.path.value: plan.start_ms, other.value: plan.other_start_ms}
    overlap = f"overlap={here.candidate.overlap_blocks} uncached={here.uncached_tokens}"
    costs = " ".join(f"{term}_ms={ms:.1f}" for term, ms in terms.items())
    return f"[{plan.instance_id} {plan.path} {overlap} {costs}]"
