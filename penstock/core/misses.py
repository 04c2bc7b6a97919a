"""Where prompts had to be computed although they, or their beginnings, had been computed before, and why.

For each request of the record, of the worker that computed its prompt:

    found        what the engine reported as cached
    predicted    what its cache events had said
    held         what the worker with most of it had, by its events, when it was decided
    seen before  how much of it an earlier request of the record shares (by the hashes that are kept)

    from    to           lost to
    ------  -----------  ------------------------------------------------------------------------------
    found   predicted    `evicted_meanwhile`: it was there when it was decided, and gone on arrival
    ...     held         why the holder was passed over: the values of PassedOver
    ...     seen before  `worker_lost`, if each worker that had computed it was lost since; `distrusted`, if
                         the cache events of one that was not are not believed now; else `evicted`
    ...     the prompt   `cold`: nobody had computed it, as far as the record reaches back

So each token counts once. The last block of a prompt is computed in any case and counts for nothing, as do
prompts that are computed whole for their log-probabilities (`whole_prompt`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from heapq import heappush, heappushpop

import msgspec

from penstock.core.decision_record import SAMPLED_BLOCKS, LostWorker, PassedOver, Placing, RoutedRequest
from penstock.core.decision_words import decision_words, later_ms

COLD = "cold"
DISTRUSTED = "distrusted"
EVICTED = "evicted"
EVICTED_MEANWHILE = "evicted_meanwhile"
WHOLE_PROMPT = "whole_prompt"
WORKER_LOST = "worker_lost"

WORST_REQUESTS = 10

MAX_PREFIXES = 200_000
"""Of which it is known who computed them, the latest ones: 40 MB while the report is made."""

MAX_COMPUTERS = 8
"""Workers that computed a prefix, the latest ones."""

_Computers = tuple[tuple[str, float], ...]  # each worker and when it did, the latest one last


class MissCause(msgspec.Struct):
    """One cause. `worker`: who could have had the tokens: the holder, the worker that was lost or that
    evicted them; empty for what nobody had. `later_ms`: of `costlier`, by how much the first token would
    have come later from the holder, as predicted, on average."""

    cause: str
    worker: str
    tokens: int
    requests: int
    later_ms: float | None = None


class MissedRequest(msgspec.Struct):
    """A request that lost much."""

    request_id: str
    created: float  # seconds since 1970
    prompt_tokens: int
    cached_tokens: int
    lost_tokens: int
    causes: dict[str, int]  # tokens
    summary: str


class Misses(msgspec.Struct):
    """The prompts of some time. `lost_tokens`: computed although some worker had had them."""

    since: float  # seconds since 1970
    requests: int
    prompt_tokens: int
    cached_tokens: int
    cold_tokens: int
    lost_tokens: int
    causes: list[MissCause]  # the most tokens first
    worst: list[MissedRequest]
    distrusted: dict[str, str]  # workers whose cache events are not believed now, and why
    object: str = "misses"


class MissReport:
    """Give it all requests of the record, the oldest first: also those before `since`, from which it learns
    what had been computed, and by whom."""

    def __init__(
        self,
        since: float,
        policy: str,
        unix_s: float,
        lost: Iterable[LostWorker],
        distrusted: Mapping[str, str],
    ) -> None:
        self._since = since
        self._policy = policy
        self._unix_s = unix_s
        self._distrusted = distrusted
        self._losses: dict[str, list[float]] = {}
        for it in lost:
            self._losses.setdefault(it.instance_id, []).append(it.at)
        self._computed: dict[int, _Computers] = {}  # by hash of a prefix
        self._computed_before: dict[int, _Computers] = {}  # once the first is full, which begins anew then
        self._later_ms: dict[tuple[str, str], float] = defaultdict(float)
        self._tokens: Counter[tuple[str, str]] = Counter()
        self._requests: Counter[tuple[str, str]] = Counter()
        self._worst: list[tuple[int, int, MissedRequest]] = []  # a heap
        self._totals: Counter[str] = Counter()

    def add(self, routed: RoutedRequest, *, counts: bool = True) -> None:
        """The next request. Not `counts`: another tenant's, which only says what had been computed."""
        if routed.kept and counts and routed.came_at >= self._since:
            self._count(routed)
        self._learn(routed)

    def result(self) -> Misses:
        """The report of what was added."""
        causes = [
            MissCause(cause, worker, tokens, self._requests[cause, worker], self._mean_ms(cause, worker))
            for (cause, worker), tokens in self._tokens.most_common()
        ]
        totals = self._totals
        return Misses(
            since=round(self._since + self._unix_s, 3),
            requests=totals["requests"],
            prompt_tokens=totals["prompt"],
            cached_tokens=totals["cached"],
            cold_tokens=sum(it.tokens for it in causes if it.cause == COLD),
            lost_tokens=sum(it.tokens for it in causes if it.cause not in (COLD, WHOLE_PROMPT)),
            causes=causes,
            worst=[request for *_, request in sorted(self._worst, reverse=True)],
            distrusted=dict(self._distrusted),
        )

    def _learn(self, routed: RoutedRequest) -> None:
        """Who has computed its prompt."""
        for attempt in routed.attempts:
            if attempt.first_output_s is None:
                continue
            this = ((attempt.instance_id, routed.came_at + attempt.first_output_s),)
            for prefix in routed.prefixes():
                others = [it for it in self._who_computed(prefix) if it[0] != attempt.instance_id]
                self._computed[prefix] = (*others[1 - MAX_COMPUTERS :], *this) if others else this
        if len(self._computed) > MAX_PREFIXES // 2:
            self._computed_before, self._computed = self._computed, {}

    def _who_computed(self, prefix: int) -> _Computers:
        return self._computed.get(prefix) or self._computed_before.get(prefix, ())

    def _count(self, routed: RoutedRequest) -> None:
        placing = routed.placings()[0]
        first = routed.attempts[0] if routed.attempts else None
        if first is None or first.cached_tokens is None:
            return  # its engine has not told yet
        prompt, found = routed.request.prompt_tokens, min(first.cached_tokens, routed.request.prompt_tokens)
        causes = _causes(routed, placing, found, *self._seen_before(routed, placing))
        self._totals.update(requests=1, prompt=prompt, cached=found)
        for (cause, worker), tokens in causes.items():
            self._tokens[cause, worker] += tokens
            self._requests[cause, worker] += 1
            if cause == PassedOver.COSTLIER:
                self._later_ms[cause, worker] += later_ms(placing.decision, worker)
        lost = {cause: tokens for (cause, _), tokens in causes.items() if cause not in (COLD, WHOLE_PROMPT)}
        if lost:
            self._note_worst(routed, placing, found, lost)

    def _seen_before(self, routed: RoutedRequest, placing: Placing) -> tuple[int, str, str]:
        """How many of its tokens an earlier request shares, whether their worker was lost or has evicted
        them, and which worker that is."""
        prefixes = routed.prefixes()
        for length, prefix in zip(reversed(SAMPLED_BLOCKS[: len(prefixes)]), prefixes[::-1], strict=True):
            computed = [it for it in self._who_computed(prefix) if it[1] < placing.at]
            if not computed:
                continue
            there = [it for it in computed if not self._was_lost(*it, placing.at)]
            worker = (there or computed)[-1][0]
            gone = EVICTED if there else WORKER_LOST
            if there and worker in self._distrusted:
                gone = DISTRUSTED
            return length * routed.block_size, gone, worker
        return 0, COLD, ""

    def _mean_ms(self, cause: str, worker: str) -> float | None:
        if cause != PassedOver.COSTLIER:
            return None
        return round(self._later_ms[cause, worker] / self._requests[cause, worker], 3)

    def _was_lost(self, worker: str, after: float, before: float) -> bool:
        return any(after <= at <= before for at in self._losses.get(worker, ()))

    def _note_worst(
        self, routed: RoutedRequest, placing: Placing, found: int, lost: Mapping[str, int]
    ) -> None:
        request = MissedRequest(
            request_id=routed.request.request_id,
            created=round(routed.came_at + self._unix_s, 3),
            prompt_tokens=routed.request.prompt_tokens,
            cached_tokens=found,
            lost_tokens=sum(lost.values()),
            causes=dict(lost),
            summary=decision_words(routed.request, placing, self._policy),
        )
        entry = (request.lost_tokens, -self._totals["requests"], request)
        if len(self._worst) < WORST_REQUESTS:
            heappush(self._worst, entry)
        else:
            heappushpop(self._worst, entry)


def _causes(
    routed: RoutedRequest, placing: Placing, found: int, seen: int, gone: str, by: str
) -> Mapping[tuple[str, str], int]:
    """The tokens of one prompt that were computed, by cause and worker, as in the table above."""
    facts, computes = routed.request, placing.decision.computes.candidate
    if facts.whole_prompt:
        return {(WHOLE_PROMPT, ""): facts.prompt_tokens - found}
    size = computes.block_size
    most = (facts.prompt_tokens - 1) // size * size
    steps = [(placing.cached_tokens, EVICTED_MEANWHILE, computes.instance_id)]
    if placing.holder is not None:
        steps.append((placing.holder.tokens, placing.holder.passed_over, placing.holder.instance_id))
    steps += [(seen, gone, by), (most, COLD, "")]
    causes, reached = {}, found
    for end, cause, worker in steps:
        tokens = min(end, most) - reached
        if tokens >= size:
            causes[str(cause), worker] = tokens
            reached += tokens
    return causes
