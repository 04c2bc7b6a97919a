"""The latest requests with what was decided for each, for whoever asks later why (core/explanation.py).

A decision is kept as the bytes of its own structs, which takes a few microseconds, and nothing is rendered
here. So a request has a known size, and thousands of them have nothing for the garbage collector to look
through, which would stop all streams for as long. Neither prompts nor answers are kept: of a prompt only
how long it is, and hashes of some of its prefixes (SAMPLED_BLOCKS), by which core/misses.py finds out what
had been computed before.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from enum import StrEnum
from heapq import nsmallest
from operator import attrgetter
from typing import Self

import msgspec

from penstock.core.attempt_times import AttemptTimes
from penstock.core.costs import Costs
from penstock.core.disagg import Plan
from penstock.core.policy import Decision
from penstock.shapes import Request

MAX_REQUESTS = 10_000
MAX_BYTES = 64 * 1024 * 1024
"""The oldest requests are forgotten beyond either: a hundred requests a second reach back for 100 s."""

MAX_KEPT_PLANS = 8
"""Of one decision: its own and the cheapest others, and that of the worker that had most of the prompt
cached. As many prefill workers."""

MAX_DECISIONS = 16
"""Of one request, the first and the latest ones; each is another attempt to serve it."""

MAX_LATE = 1000
"""Attempts whose request has ended and whose engine has not told their times yet, the latest ones."""

MAX_LOST = 1000
"""Workers that were lost, the latest ones."""

REQUEST_BYTES = 1500
"""About what a request takes in memory beside its decisions."""

_ENCODER = msgspec.msgpack.Encoder()
_total_ms, _ready_ms = attrgetter("total_ms"), attrgetter("ready_ms")


def _sampled_blocks() -> tuple[int, ...]:
    """Each block of a short prefix, then steps of an eighth of the length."""
    lengths, length = [], 1
    while length < 2**20:
        lengths.append(length)
        length += max(1, length // 8)
    return tuple(lengths)


SAMPLED_BLOCKS = _sampled_blocks()
"""Lengths of prefixes, in blocks, whose hashes are kept: two prompts that share a prefix are found to share
seven eighths of it at least."""


class PassedOver(StrEnum):
    """Why the worker that had most of a prompt cached was not chosen to compute it."""

    COSTLIER = "costlier"  # it was compared, and was not the cheapest
    NOT_ASKED = "not_asked"  # the policy had not shortlisted it
    AVOIDED = "avoided"  # an attempt of this request failed there
    FULL = "full"  # it has just refused an attempt, or its link is full
    SUSPECT = "suspect"  # this request, or one that runs there, may be killing engines
    OTHER_FORMAT = "other_format"  # a prefill worker whose KV no decode worker reads
    NO_PREFILL = "no_prefill"  # a prefill worker, and none is to be used
    NOT_READY = "not_ready"  # it takes no new attempts of this model's revision


class Holder(msgspec.Struct, frozen=True, gc=False):
    """The worker that had most of a prompt cached, where another one computed it."""

    instance_id: str
    tokens: int
    passed_over: PassedOver


class Placing(msgspec.Struct, frozen=True, gc=False):
    """One decision of a request: where its next attempts went. `waited_s`: how long it had been waiting in
    the frontend, by then; `avoided`: the workers that it was kept away from; `cached_tokens`: what the
    worker that computes the prompt had of it, as far as its events say; `plans_left_out`: how many more
    were compared."""

    at: float
    decision: Decision
    waited_s: float
    retried_because: str
    avoided: frozenset[str]
    attempts_before: int
    cached_tokens: int
    holder: Holder | None
    plans_left_out: int


class RoutedRequest(msgspec.Struct, gc=False, eq=False):
    """One request and all that was decided for it. Times in seconds of the frontend's clock."""

    request: RequestFacts
    came_at: float
    expected_wait_ms: float  # in the frontend's queue, as predicted when it came
    attempts: Sequence[AttemptTimes]  # shared with its state machine, which goes on writing them
    kept: tuple[bytes, ...] = ()  # its decisions
    sampled: bytes = b""  # hashes of its first SAMPLED_BLOCKS
    block_size: int = 0  # of these
    ended_at: float | None = None
    complete: bool = False
    output_tokens: int = 0
    error: str = ""  # why it failed
    size: int = REQUEST_BYTES
    forgotten: bool = False

    def keep(self, placing: Placing) -> None:
        """A decision for it."""
        kept = (*self.kept, _ENCODER.encode(_shortened(placing)))
        self.kept = kept if len(kept) <= MAX_DECISIONS else (kept[0], *kept[2:])

    def placings(self) -> list[Placing]:
        """Its decisions, in order."""
        return [_DECODER.decode(each) for each in self.kept]

    def prefixes(self) -> Sequence[int]:
        """The hashes of its first SAMPLED_BLOCKS, the shortest first."""
        return memoryview(self.sampled).cast("Q")


class RequestFacts(msgspec.Struct, frozen=True, gc=False):
    """What is kept of a request itself."""

    request_id: str
    call_id: str
    client_id: str
    model: str
    tenant: str
    prompt_tokens: int
    whole_prompt: bool  # it asked for log-probabilities of the prompt, which is computed whole then

    @classmethod
    def of(cls, request: Request) -> Self:
        """Of this request."""
        return cls(
            request.request_id,
            request.call_id,
            request.client_id,
            request.model.name,
            request.tenant,
            len(request.token_ids),
            request.sampling.prompt_logprobs is not None,
        )


class LostWorker(msgspec.Struct, frozen=True, gc=False):
    """A worker that left, died or fell silent: its cache is void, also if it returns."""

    at: float
    instance_id: str
    reason: str


class DecisionRecord:
    """The latest requests of a frontend, within both limits. `lost` has the latest lost workers."""

    def __init__(self, max_requests: int = MAX_REQUESTS, max_bytes: int = MAX_BYTES) -> None:
        self.lost: deque[LostWorker] = deque(maxlen=MAX_LOST)
        self.bytes = 0
        self.forgotten_at: float | None = None  # when the latest one that was forgotten had come
        self._requests: deque[RoutedRequest] = deque()  # in the order in which they came
        self._late: dict[str, AttemptTimes] = {}  # by attempt id
        self._max_requests = max_requests
        self._max_bytes = max_bytes

    def __iter__(self) -> Iterator[RoutedRequest]:
        """From the oldest to the latest."""
        return iter(list(self._requests))

    def __len__(self) -> int:
        return len(self._requests)

    def came(
        self, request: Request, attempts: Sequence[AttemptTimes], came_at: float, expected_wait_ms: float
    ) -> RoutedRequest:
        """A request was let in."""
        routed = RoutedRequest(RequestFacts.of(request), came_at, expected_wait_ms, attempts)
        self._requests.append(routed)
        self.bytes += routed.size
        self._forget()
        return routed

    def placed(
        self, routed: RoutedRequest, placing: Placing, hashes: Sequence[int], block_size: int
    ) -> None:
        """A decision is acted on. `hashes`: of the prompt's blocks, as the worker that computes it makes
        them."""
        if not routed.kept:
            end = bisect_right(SAMPLED_BLOCKS, len(hashes))
            routed.sampled = array("Q", [hashes[length - 1] for length in SAMPLED_BLOCKS[:end]]).tobytes()
            routed.block_size = block_size
        routed.keep(placing)
        size = REQUEST_BYTES + len(routed.sampled) + sum(map(len, routed.kept))
        more, routed.size = size - routed.size, size
        if not routed.forgotten:
            self.bytes += more
            self._forget()

    def ended(
        self,
        routed: RoutedRequest,
        now: float,
        *,
        complete: bool,
        output_tokens: int,
        error: str = "",
    ) -> None:
        """The request wants nothing more."""
        routed.attempts = tuple(routed.attempts)
        if routed.attempts and routed.attempts[-1].took is None:
            self._late[routed.attempts[-1].attempt_id] = routed.attempts[-1]
            if len(self._late) > MAX_LATE:
                del self._late[next(iter(self._late))]
        routed.ended_at, routed.complete = now, complete
        routed.output_tokens, routed.error = output_tokens, error

    def late(self, attempt_id: str, took: tuple[float, float, float, float]) -> None:
        """The times of an attempt came after its request had ended, as when that ended at a stop string."""
        attempt = self._late.pop(attempt_id, None)
        if attempt is not None:
            attempt.took = took

    def worker_lost(self, instance_id: str, reason: str, now: float) -> None:
        """What it had cached is gone."""
        self.lost.append(LostWorker(now, instance_id, reason))

    def find(self, name: str) -> list[RoutedRequest]:
        """The requests of a call, by the id of its answer or by the client's own; or one of them, by its
        own id or that of an attempt."""
        again = name + "-again"
        return [
            it
            for it in self._requests
            if name in (it.request.call_id, it.request.client_id, it.request.request_id)
            or it.request.call_id.startswith(again)
            or name.startswith(it.request.request_id + ".")
        ]

    def reach_words(self, now: float) -> str:
        """How far the record reaches back, in words."""
        if self.forgotten_at is None:
            return "all since this frontend started"
        minutes = (now - self.forgotten_at) / 60
        return f"those of the last {minutes:.1f} minutes"

    def _forget(self) -> None:
        while len(self._requests) > self._max_requests or self.bytes > self._max_bytes:
            oldest = self._requests.popleft()
            self.bytes -= oldest.size
            self.forgotten_at, oldest.forgotten = oldest.came_at, True


def _shortened(placing: Placing) -> Placing:
    """With few of the plans of a large graph."""
    decision, holder = placing.decision, placing.holder
    if len(decision.plans) <= MAX_KEPT_PLANS and len(decision.prefills) <= MAX_KEPT_PLANS:
        if decision.plans_left_out:
            placing = msgspec.structs.replace(placing, plans_left_out=decision.plans_left_out)
        return placing
    needed = {decision.decode, decision.prefill, holder.instance_id if holder is not None else None}
    plans: list[Plan] = nsmallest(MAX_KEPT_PLANS, decision.plans, key=_total_ms)
    plans += [it for it in decision.plans[MAX_KEPT_PLANS:] if it.instance_id in needed]
    prefills: list[Costs] = nsmallest(MAX_KEPT_PLANS, decision.prefills, key=_ready_ms)
    known = {it.candidate.instance_id for it in prefills}
    prefills += [
        it
        for it in decision.prefills
        if it.candidate.instance_id in needed and it.candidate.instance_id not in known
    ]
    return msgspec.structs.replace(
        placing,
        decision=msgspec.structs.replace(decision, plans=plans, prefills=prefills),
        plans_left_out=decision.plans_left_out + len(decision.plans) - len(plans),
    )


_DECODER = msgspec.msgpack.Decoder(Placing)
