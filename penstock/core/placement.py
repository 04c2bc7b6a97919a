"""What one frontend knows of all workers' caches and loads, and the choices made from it.

Brings the index, the loads and the overlap check together behind the few words that the router needs: an
instance came up, said something, went away; choose for this request; this attempt was sent.

An instance that the overlap check distrusts, or that tells nothing of its cache, counts by the approximate
index. What its events say is compared with what its engine reports all the same, and counts again once it
is right.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING

import msgspec

from penstock.core.announcements import Announcements
from penstock.core.approximate_index import ApproximateIndex
from penstock.core.costs import EXPECTED_OUTPUT_TOKENS, STEP_TOKENS, OutputLengths
from penstock.core.decision_words import COSTS_POLICY, plan_costs_ms
from penstock.core.disagg import Disagg, waiting_for_each
from penstock.core.hashing import root_hash, sequence_hashes
from penstock.core.overlap_check import OverlapCheck, Verdict
from penstock.core.pairing import KvFormat, kv_format, unpaired
from penstock.core.policy import Candidate, Decision, Path, Plan, Query, choose
from penstock.core.pool_rates import PoolRates
from penstock.core.prefix_index import PrefixIndex, most_blocks
from penstock.core.prompt_work import UsualPrompt, prompt_work
from penstock.core.worker_load import WorkerLoad
from penstock.errors import ProtocolError
from penstock.shapes import Attempt, Card, Handoff, Load, Request

if TYPE_CHECKING:
    from penstock.core.cost_columns import CostColumns

MANY_WORKERS = 64
"""From so many on, not every worker's costs are computed one by one (core/cost_columns.py): with fewer that
takes longer."""

MAX_VERDICTS = 1000
"""Changes of trust that nobody has asked for yet, the latest ones."""


@dataclass(slots=True, eq=False)
class Placed:
    """One request's standing in the books."""

    request: Request
    hashes: dict[int, list[int]] = field(default_factory=dict)  # by block size
    overlap_tokens: dict[str, int] = field(default_factory=dict)  # by instance, those with any, as of then
    told_tokens: dict[str, int] = field(default_factory=dict)  # by events of those that are distrusted
    others_waiting: int = 0  # how many other requests wait in the frontend for its model
    booked_on: str = ""  # the decode worker promised to it, while a prefill worker has it
    runs_on: str = ""  # where its current attempt is
    sent_tokens: int = 0  # of that attempt
    named_before: int = 0  # blocks, by that instance's events, when it was sent
    predicted_tokens: int | None = None  # cached there, as foreseen; None when there is nothing to check
    computed_from: int | None = None  # its first block that was not there before; None: not known yet
    holder: str = ""  # the instance with most of the prompt cached, as of the last choice; "": none has any
    held_tokens: int = 0  # how much that is


class Placement:
    """Pure, but for its random generator, which breaks ties. `now` in seconds, of one clock."""

    def __init__(
        self,
        policy: str,
        disagg: str,
        rng: random.Random,
        slo_itl_ms: float = 0.0,
        *,
        many_workers: int = MANY_WORKERS,
    ) -> None:
        self._policy = policy
        self._disagg = disagg
        self._slo_itl_ms = slo_itl_ms
        self._rng = rng
        self._many_workers = many_workers
        self.index = PrefixIndex()
        self.loads: dict[str, WorkerLoad] = {}  # of the connected instances
        self.overlap_check = OverlapCheck()
        self.approximate = ApproximateIndex()  # of those that are distrusted
        self._announcements = Announcements(self.index)
        self._doubted: set[str] = set()  # those that were distrusted since their link began
        self._verdicts: deque[tuple[str, Verdict]] = deque(maxlen=MAX_VERDICTS)
        self._cards: dict[str, Card] = {}  # theirs
        self._formats: dict[str, KvFormat] = {}  # of these
        self._columns: CostColumns | None = None  # their figures, once there have been many
        self._pool_rates = PoolRates()
        self._lengths = OutputLengths()
        self._usual_prompts: dict[str, UsualPrompt] = {}  # by model
        self._usual_length = ("", 0, 0.0)  # of which model, as of which decision, in tokens
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
        self._formats[card.instance_id] = kv_format(card.engine)
        self.index.add_worker(card.instance_id)
        known = self.loads[card.instance_id] = WorkerLoad(load)
        self._pool_rates.up(card, known)
        if self._columns is not None:
            self._columns.add(card)
            self._load_changed(card.instance_id)
        elif len(self.loads) >= self._many_workers and self._policy == COSTS_POLICY:
            from penstock.core.cost_columns import CostColumns  # imports numpy

            self._columns = CostColumns()
            for each in self._cards.values():
                self._columns.add(each)
                self._load_changed(each.instance_id)
        if card.engine.kv_events:
            self._announcements.add_worker(card.instance_id, card.engine.block_size)
            if self.index.held(card.instance_id) > most_blocks(card.engine.total_blocks):
                self._overflowed(card.instance_id)
        else:
            self.overlap_check.tells_nothing(card.instance_id)
            self.approximate.add_worker(card.instance_id, card.engine.total_blocks)

    def down(self, instance_id: str) -> None:
        """Everything known of it is void."""
        self._cards.pop(instance_id, None)
        self._formats.pop(instance_id, None)
        self.loads.pop(instance_id, None)
        self._pool_rates.down(instance_id)
        self.index.remove_worker(instance_id)
        self.overlap_check.forget(instance_id)
        if self._columns is not None:
            self._columns.remove(instance_id)
        self.approximate.remove_worker(instance_id)
        self._announcements.remove_worker(instance_id)
        self._doubted.discard(instance_id)

    def cache_changed(
        self, instance_id: str, stored: Sequence[int], removed: Sequence[int], cleared: bool
    ) -> None:
        """One step's KV events. Raises ProtocolError when they do not fit to those before, or to the
        instance's pool: the index has lost its worth then, and only a new snapshot restores it. Of an
        instance that was distrusted nothing else is expected, and its requests should go on."""
        if cleared:
            self.index.cleared(instance_id)
        if removed:
            gone = self.index.removed(instance_id, removed)
            if gone < len(removed) and instance_id not in self._doubted:
                unknown = len(removed) - gone
                raise ProtocolError(
                    f"step.removed: {unknown} blocks that were not stored, or were removed twice"
                )
        if stored:
            self.index.stored(instance_id, stored)
            self._announcements.named(instance_id, len(stored))
            held = self.index.held(instance_id)
            most = most_blocks(self._cards[instance_id].engine.total_blocks)
            if held > most and instance_id in self._doubted:
                self._overflowed(instance_id)
            elif held > most:
                raise ProtocolError(f"step.stored: {held} blocks are cached, expected {most} at most")

    def reported(self, instance_id: str, seen: int, load: Load, now: float) -> None:
        """Its load, which includes every attempt up to `seen`."""
        self.loads[instance_id].report(seen, load, now)
        for changed in self._pool_rates.reported(instance_id):
            self._load_changed(changed)

    def _load_changed(self, instance_id: str) -> None:
        if self._columns is not None:
            load = self.loads[instance_id]
            self._columns.put(instance_id, load, load.computed(_step_tokens(self._cards[instance_id])))

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
        self._usual_prompts.pop(model, None)

    # --- a request ----------------------------------------------------------------------------------

    def choose(
        self, placed: Placed, tokens: list[int], cards: list[Card], handoff: Handoff | None, now: float
    ) -> Decision | None:
        """Choose among these instances for a prompt (with what was generated of it so far).

        `handoff`: its KV is ready on a prefill worker, so only a decode worker that reads it is needed.
        Where there is none, the decision is as if it were not. None: none of them can. `book` follows when
        the decision is acted on.
        """
        self.unbook(placed)  # of an earlier decision: it must not see itself in the load
        self._ordinal += 1
        return self._choose(placed, tokens, cards, handoff, self._ordinal, self._rng, now)

    def foresee(self, placed: Placed, tokens: list[int], cards: list[Card], now: float) -> Decision | None:
        """What `choose` would decide next, and will: nothing here changes by it."""
        rng = random.Random()
        rng.setstate(self._rng.getstate())
        return self._choose(placed, tokens, cards, None, self._ordinal + 1, rng, now)

    def _choose(
        self,
        placed: Placed,
        tokens: list[int],
        cards: list[Card],
        handoff: Handoff | None,
        ordinal: int,
        rng: random.Random,
        now: float,
    ) -> Decision | None:
        for_prefill, for_decode = waiting_for_each(placed.others_waiting, cards)
        query = Query(
            prompt_tokens=len(tokens),
            ordinal=ordinal,
            expected_output_tokens=self.expected_output_tokens(placed.request),
            handed=kv_format(handoff) if handoff is not None else None,
            slo_itl_ms=self._slo_itl_ms,
            usual_prompt=self._usual_prompt(placed.request.model.name).work,
            session=placed.request.session,
            waiting_for_prefill=for_prefill,
            waiting_for_decode=for_decode,
        )
        overlaps = self._overlaps(placed, tokens, cards)
        decoders = None
        if self._columns is not None and len(cards) >= self._many_workers:
            disagg = Disagg(self._disagg)
            cards, decoders = self._columns.few(query, cards, overlaps, placed.holder, disagg, rng, now)
        candidates = [self._candidate(card, overlaps, now) for card in cards]
        decision = choose(query, candidates, policy=self._policy, disagg=self._disagg, rng=rng)
        if decision is None or decoders is None:
            return decision
        return msgspec.structs.replace(decision, plans_left_out=decoders - len(decision.plans))

    def book(self, placed: Placed, decision: Decision, tokens: list[int]) -> None:
        """The decode worker of a disaggregated request is booked until `sent`, `unbook` or `ended`."""
        if decision.prefill is not None:
            placed.booked_on = decision.decode
            self.loads[decision.decode].book(placed.request.request_id, len(tokens))
            self._load_changed(decision.decode)

    def _overlaps(self, placed: Placed, tokens: list[int], cards: list[Card]) -> Mapping[str, int]:
        """How many of the prompt's blocks each instance has, by its events or by all appearances; those
        without any may be missing."""
        if self._columns is not None and len(cards) >= self._many_workers:
            sizes = self._columns.block_sizes(cards)
        else:
            sizes = {card.engine.block_size for card in cards}
        found = {size: self.index.overlaps(_hashes(placed, tokens, size)) for size in sizes}
        self._put_approximate(placed, found)
        self._note_holder(placed, len(tokens), found)
        placed.overlap_tokens = {}
        if placed.request.sampling.prompt_logprobs is not None:
            return {}  # its prompt is computed whole, whatever is cached
        overlaps = {}
        for size, blocks in found.items():
            # An engine computes the last token again at least, and with it that token's block.
            most = (len(tokens) - 1) // size
            for instance_id, overlap in blocks.items():
                placed.overlap_tokens[instance_id] = min(overlap, most) * size
                overlaps[instance_id] = overlap
        return overlaps

    def _candidate(self, card: Card, overlaps: Mapping[str, int], now: float) -> Candidate:
        instance_id, engine, step_tokens = card.instance_id, card.engine, _step_tokens(card)
        load = self.loads[instance_id]
        return Candidate(
            instance_id=instance_id,
            role=card.role,
            load=load.assumed(),
            block_size=engine.block_size,
            overlap_blocks=overlaps.get(instance_id, 0),
            max_running=engine.max_running,
            prompt_tokens=load.prompt_tokens,
            prompt_context_tokens=load.prompt_context_tokens,
            output_tokens=load.output_length,
            kv_format=self._formats[instance_id],
            distrusted=self.overlap_check.causes.get(instance_id, ""),
            step_tokens=step_tokens,
            step=load.step(step_tokens, now),
        )

    def _put_approximate(self, placed: Placed, overlaps: dict[int, dict[str, int]]) -> None:
        """Put what the approximate index says in the place of what distrusted instances tell."""
        placed.told_tokens.clear()
        for instance_id in self.overlap_check.causes:
            card = self._cards[instance_id]
            found = overlaps.get(card.engine.block_size)
            if found is None or card.model.name != placed.request.model.name:
                continue
            size = card.engine.block_size
            placed.told_tokens[instance_id] = found.pop(instance_id, 0) * size
            overlap = self.approximate.overlap(instance_id, placed.hashes[size])
            if overlap:
                found[instance_id] = overlap

    def _note_holder(self, placed: Placed, tokens: int, overlaps: dict[int, dict[str, int]]) -> None:
        """Who has most of the prompt, of all instances: also those that the request must not go to."""
        placed.holder, placed.held_tokens = "", 0
        if placed.request.sampling.prompt_logprobs is not None:
            return
        for size, found in overlaps.items():
            if found:
                most = max(found, key=found.__getitem__)
                held = min(found[most], (tokens - 1) // size) * size
                if held > placed.held_tokens:
                    placed.holder, placed.held_tokens = most, held

    def sent(self, placed: Placed, instance_id: str, seq: int, attempt: Attempt, now: float) -> None:
        """An attempt left for this instance as number `seq` on its link."""
        self._left(placed)
        tokens = len(attempt.token_ids)
        overlap = min(placed.overlap_tokens.get(instance_id, 0), tokens - 1)
        have = overlap if attempt.handoff is None else max(overlap, attempt.handoff.num_tokens)
        output_tokens = self.expected_output_tokens(placed.request)
        self.loads[instance_id].send(seq, max(1, tokens - have), tokens, output_tokens, now)
        self._load_changed(instance_id)
        if attempt.handoff is None:
            self._usual_prompt(placed.request.model.name).add(prompt_work(min(have, tokens - 1), tokens))
        if placed.booked_on == instance_id:
            self.unbook(placed)
        placed.runs_on, placed.sent_tokens, placed.computed_from = instance_id, tokens, None
        placed.named_before = self._announcements.named(instance_id)
        # What the engine reports after a handoff includes the blocks it pulled: not the index's doing.
        checkable = attempt.handoff is None and attempt.sampling.prompt_logprobs is None
        placed.predicted_tokens = overlap if checkable else None

    def ended(self, placed: Placed, output_tokens: int | None, output_ids: Sequence[int] = ()) -> None:
        """The request wants nothing more. `output_tokens`: None when its output was cut short, which says
        nothing of lengths. `output_ids`: the tokens that it got."""
        self.unbook(placed)
        self._left(placed)
        if placed.runs_on and output_tokens is not None:
            model, tenant = placed.request.model.name, placed.request.tenant
            prior = self._lengths.mean(model, tenant) or self._usual_output_tokens(model)
            self._lengths.ended(model, tenant, output_tokens, prior)
        if placed.computed_from is not None and placed.runs_on in self.approximate:
            size = self._cards[placed.runs_on].engine.block_size
            # The KV of the last token is never computed.
            computed = [*placed.request.token_ids, *output_ids][:-1]
            self.approximate.used(placed.runs_on, _hashes(placed, computed, size))

    def _left(self, placed: Placed) -> None:
        """Its attempt, if there was one, has ended: see whether events named what it had computed."""
        instance_id, first = placed.runs_on, placed.computed_from
        if first is None or instance_id not in self.loads:
            return
        request, size = placed.request, self._cards[instance_id].engine.block_size
        known = self._announcements.computed(
            instance_id,
            self.loads[instance_id].reported.steps,
            placed.named_before,
            placed.hashes.get(size, [])[first:],
            request.token_ids,
            root_hash(request.model.name, request.cache_salt),
        )
        for announcement in known:
            self._judged(instance_id, self.overlap_check.announced(instance_id, announcement))

    def _overflowed(self, instance_id: str) -> None:
        """It says that more is cached than it can have: what it says of what is gone cannot be right."""
        self.index.cleared(instance_id)
        self._judged(instance_id, self.overlap_check.overflowed(instance_id))

    def _judged(self, instance_id: str, verdict: Verdict | None) -> None:
        if verdict is None:
            return
        if verdict.cause is None:
            self.approximate.remove_worker(instance_id)
        else:
            self._doubted.add(instance_id)
            self.approximate.add_worker(instance_id, self._cards[instance_id].engine.total_blocks)
        self._verdicts.append((instance_id, verdict))

    def verdicts(self) -> list[tuple[str, Verdict]]:
        """The changes of trust since this was last asked, by instance."""
        verdicts = list(self._verdicts)
        self._verdicts.clear()
        return verdicts

    def _usual_prompt(self, model: str) -> UsualPrompt:
        """What its requests gave workers to compute, whichever worker that was."""
        return self._usual_prompts.setdefault(model, UsualPrompt())

    def expected_output_tokens(self, request: Request) -> float:
        """How long its output will be, going by its tenant's others, or by what workers report of all."""
        mean = self._lengths.mean(request.model.name, request.tenant)
        if mean is None:
            mean = self._usual_output_tokens(request.model.name)
        return min(mean, request.sampling.max_tokens)

    def _usual_output_tokens(self, model: str) -> float:
        """As workers report it; with many workers, not looked up for every decision."""
        known, looked_up, mean = self._usual_length
        if known != model or self._ordinal - looked_up >= len(self.loads) // MANY_WORKERS:
            loads = [it for name, it in self.loads.items() if self._cards[name].model.name == model]
            lengths = [it.reported.output_tokens for it in loads if it.reported.output_tokens]
            mean = fmean(lengths) if lengths else EXPECTED_OUTPUT_TOKENS
            self._usual_length = model, self._ordinal, mean
        return mean

    def unbook(self, placed: Placed) -> None:
        """No instance is promised to it any more."""
        load = self.loads.get(placed.booked_on)
        if load is not None:
            load.release(placed.request.request_id)
            self._load_changed(placed.booked_on)
        placed.booked_on = ""

    def cached(
        self, placed: Placed, instance_id: str, cached_tokens: int, pulled_blocks: int | None = None
    ) -> int | None:
        """An engine reports how much of the prompt it had cached, and pulled. Returns how much that was
        predicted to be; None when there is nothing to compare."""
        if placed.runs_on != instance_id or instance_id not in self._cards:
            return None
        size = self._cards[instance_id].engine.block_size
        hashes = placed.hashes.get(size, [])
        placed.computed_from = found = max(0, cached_tokens // size - (pulled_blocks or 0))
        predicted, placed.predicted_tokens = placed.predicted_tokens, None
        if instance_id in self.approximate:
            if predicted is not None or pulled_blocks is not None:
                self.approximate.found(instance_id, hashes[: (placed.sent_tokens - 1) // size], found)
            self.approximate.used(instance_id, hashes, max(0, len(hashes) - found))
        if predicted is None:
            return None
        told = min(placed.told_tokens.get(instance_id, predicted), (placed.sent_tokens - 1) // size * size)
        if cached_tokens > told:  # the blocks of an earlier request with this prefix may have come since
            overlap = self.index.overlaps(hashes).get(instance_id, 0)
            told = max(told, min(cached_tokens, overlap * size))
        held = self.index.held(instance_id)
        self._judged(
            instance_id,
            self.overlap_check.observe(instance_id, told, cached_tokens, size, held_blocks=held),
        )
        if cached_tokens >= told + size and self.overlap_check.healthy(instance_id):
            self.index.stored(instance_id, hashes[:found])  # stored before its events could be heard
        return predicted


def _step_tokens(card: Card) -> int:
    """How many prompt tokens its engine computes in a step."""
    return card.engine.max_batch_tokens or STEP_TOKENS


def _hashes(placed: Placed, tokens: Sequence[int], block_size: int) -> list[int]:
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
    terms = plan_costs_ms(plan) | {"total": plan.total_ms}
    if plan.other_start_ms is not None:  # why this path: what the first token costs by either
        other = Path.LOCAL if plan.path is Path.REMOTE else Path.REMOTE
        terms |= {plan.path.value: plan.start_ms, other.value: plan.other_start_ms}
    overlap = f"overlap={here.candidate.overlap_blocks} uncached={here.uncached_tokens}"
    costs = " ".join(f"{term}_ms={ms:.1f}" for term, ms in terms.items())
    return f"[{plan.instance_id} {plan.path} {overlap} {costs}]"
