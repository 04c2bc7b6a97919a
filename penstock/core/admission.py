"""Which requests of a model wait at a frontend, in which order, and which are told to come back later.

Theory. Workers get work just ahead of their needs: a request is sent only while some worker could begin it
within `dispatch_wait_ms`. All others wait here, where a later one may still go first, and an engine's own
queue stays short. Who could not begin within `max_wait_ms` hears so at once. Who was let in is never sent
away: overtaken, or after an error of the prediction, it waits for its turn, until a deadline of its own.

Order. Lines by priority, the lower number first; a line waits until those before it are empty, and nobody
moves up by waiting. Within a line, tenants take turns by start-time fair queueing (Goyal and others, 1996):
the tenant with the least virtual time goes, and then pays what its call costs. One that had nothing waiting
starts at the time of whoever was served last, so nothing can be saved up. A tenant's calls go first come,
first served. Before all lines are the requests that were sent once and came back, as their worker was lost
or full: they were at the head when they left. The choices of a call go together or not at all.

Prediction. A newcomer waits until those in front of it have gone:

    wait_ms = wait of the head + max(pace * work ahead / (1 - share of the lines before),
                                     its flow's pace * the flow's work ahead)

Work is in tokens (see `work_tokens`), pace in ms per token. The queue's pace is measured while something
waits, so it holds whatever limits the workers: prompts, decoding, blocks, or other frontends' requests.
What will come later and go first slows a line down by the share of the workers that the lines before it
have lately had, and a flow (a tenant within a line) by what shows in its own pace, measured like the other.
"""

from __future__ import annotations

import math
from random import Random

import msgspec

from penstock.core.lines import Call, Flow, Line, flow_start
from penstock.core.pace import Drain, Recent
from penstock.core.room import Room

ACCEPT_SHARE = 0.8
"""Of `max_wait_ms`: the longest predicted wait with which a newcomer is let in. Predictions err; with this
margin, few of those let in wait for longer than that."""

TENANT_FLOWS = 2
"""As much room in a queue as this many flows may have is what a tenant gets for all its priorities."""

OUTPUT_WORK = 4.0
"""Work of an output token, in prompt tokens: on Qwen3-32B (2 x H200) with 64 requests a step, a prompt
token takes 46 us and an output token 200."""

LARGEST_SHARE = 0.99
"""Of the lines before one, in a prediction: they may stop any time."""

MAX_RETRY_S = 60.0
"""Of Retry-After, before it is spread: further than this nobody can see."""

_BACK = -(2**31) - 1  # the line of those who came back: before every priority, which has 32 bits
_NOBODY = "\0"  # the tenant of that line: no key has this name


class AdmissionSettings(msgspec.Struct, frozen=True):
    """How long requests may wait, and where."""

    max_wait_ms: float = 10_000.0
    """The longest wait for a worker, its engine's queue included, for which one is let in. Set it to the
    objective for the time to first token, less what a prompt takes."""

    dispatch_wait_ms: float = 250.0
    """A request is sent while some worker could begin it within this: two or three steps of the largest
    batches, so that no engine runs dry between two reports, and little is beyond reordering."""

    max_itl_ms: float = 0.0
    """The mean time between tokens up to which a worker is given more requests; 0: any."""

    max_queued: float = 8192
    """Calls of a model that may wait here, whatever the prediction: as many as a
    frontend serves at one time (frontend/settings.py: max_inflight). A tenant's calls of one priority can
    fill half of it, and so leave room at the frontend's door."""

    max_queued_bytes: int = 1024 * 1024 * 1024
    """Memory that requests may take which wait in a frontend, over all models, whatever the prediction
    (core/room.py): some 24 million prompt tokens. A tenant's can fill half of it. The choices of a call are
    let in together, so one call can exceed it, by 4 million tokens at most."""

    max_queued_work: float = math.inf
    """Work that may wait here. A tenant's can fill half of it."""

    @property
    def gate_ms(self) -> float:
        """The wait at a worker up to which requests are sent."""
        return min(self.dispatch_wait_ms, self.max_wait_ms)


class Refusal(msgspec.Struct, frozen=True):
    """Why a request is not let in."""

    reason: str  # wait or full
    wait_ms: float  # as predicted for a newcomer in its place
    bound_ms: float
    place: int  # how many would go before it
    retry_after_s: float  # whole seconds
    awaited: str = "a worker"
    limit: str = ""  # with full: what there are too many of

    def __str__(self) -> str:
        limit = f" limit={self.limit}" if self.limit else ""
        return (
            f"Too many requests are waiting for {self.awaited} (reason={self.reason}{limit} "
            f"wait_ms={self.wait_ms:.0f} bound_ms={self.bound_ms:.0f} place={self.place})."
        )


def work_tokens(prompt_tokens: int, output_tokens: float) -> float:
    """What a request costs its tenant."""
    return prompt_tokens + OUTPUT_WORK * output_tokens


class Queue:
    """The requests of one model that wait. Pure; `now` in seconds, `rng` spreads the retries of those sent
    away.

    A request enters (`enter`, or `back` when it was sent before), asks for a worker whenever `turn` says
    so, and is out of the queue with `take`, when it goes to one, or `leave`, when it does not.
    """

    def __init__(
        self,
        settings: AdmissionSettings,
        rng: Random,
        awaited: str = "a worker",
        *,
        timed: bool = False,
        room: Room | None = None,
    ) -> None:
        """`awaited` is what they wait for, in the words of a refusal; `timed`: how long their work took is
        told (`took`), and not guessed from when they go; `room`: for what they take, shared with other
        queues."""
        self._settings = settings
        self._room = room or Room(settings.max_queued_bytes)
        self._rng = rng
        self._awaited = awaited
        self._timed = timed
        self._lines: dict[int, Line] = {}
        self._calls: dict[str, Call] = {}  # by request id
        self._waiting = 0  # calls
        self._along: dict[str, None] = {}  # requests whose call has gone: they follow, in this order
        self._gone_key = ""  # the call that went last
        self._half_s = settings.max_wait_ms / 2e3
        self._drain = Drain(0.0 if timed else self._half_s)
        self._recent = Recent(self._half_s)
        self._head_ms = 0.0  # how long the head has to wait at the workers, as of its latest try
        self._workers = 1

    def __len__(self) -> int:
        return len(self._calls)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._calls or request_id in self._along

    # --- coming and going ---------------------------------------------------------------------------

    def holds(self, call_id: str, tenant: str, priority: int) -> bool:
        """Whether this call was let in already, with the first of its choices."""
        line = self._lines.get(priority)
        flow = line.flows.get(tenant) if line is not None else None
        waits = flow is not None and call_id in flow.calls
        return bool(call_id) and (waits or call_id == self._gone_key)

    def refusal(
        self, tenant: str, priority: int, now: float, *, parts: float = 0.0, size: int = 0
    ) -> Refusal | None:
        """Why a newcomer would be refused, whatever it costs; None when it would be let in.

        With nothing waiting here, no wait is predicted: what the workers' wait is, shows with the first
        try, and then `hopeless` says the same. For one that goes in parts with others between them
        (`take_part`), `parts` is its work, and the wait is the one for its last part. `size`: the
        bytes that it takes, once known."""
        wait_ms, place = self._predict(tenant, priority, now, parts) if self._calls else (0.0, 0)
        if wait_ms > ACCEPT_SHARE * self._settings.max_wait_ms:
            return self._refuse("wait", wait_ms, place)
        limit = self._full(tenant, priority, parts, size)
        return self._refuse("full", wait_ms, place, limit) if limit else None

    def hopeless(self, request_id: str) -> Refusal | None:
        """Why the newcomer is refused after all, if it is the only one and the workers' wait alone is too
        long."""
        if len(self._calls) != 1 or request_id not in self._calls:
            return None
        if self._head_ms <= ACCEPT_SHARE * self._settings.max_wait_ms:
            return None
        return self._refuse("wait", self._head_ms, 0)

    def enter(
        self,
        request_id: str,
        call_id: str,
        tenant: str,
        priority: int,
        work: float,
        now: float,
        size: int = 0,
    ) -> None:
        """Let a newcomer in that `refusal` had nothing against.

        Requests with the same `call_id`, which may be empty, must come one directly after the other."""
        if call_id and call_id == self._gone_key:
            self._along[request_id] = None
        else:
            self._add(request_id, call_id or request_id, tenant, priority, work, now, size)

    def back(self, request_id: str, work: float, now: float, size: int = 0) -> None:
        """One that was sent before is to be sent again. It is never refused here."""
        self._add(request_id, request_id, _NOBODY, _BACK, work, now, size)

    def turn(self, request_id: str) -> bool:
        """Whether this request may ask for a worker now."""
        if request_id in self._along:
            return True
        call = self._calls.get(request_id)
        return call is not None and call is self._first()

    def may_go(
        self, request_id: str, wait_ms: float, workers: int, now: float, *, crowded: bool = False
    ) -> bool:
        """Whether this request, whose turn it is, is to be sent; if not, it waits on.

        Args:
            wait_ms: the least time in which one of the workers could begin it.
            workers: how many there are that can end it.
            crowded: whether each of them has as many as it should have, whoever may wait.
        """
        if request_id in self._along:
            return True
        self._head_ms = wait_ms
        self._workers = max(1, workers)
        if self.fits(request_id, wait_ms, crowded):
            return True
        self.hold(request_id, now)
        return False

    def fits(self, request_id: str, wait_ms: float, crowded: bool) -> bool:
        """Whether one whose turn it is would be sent, see `may_go`."""
        if request_id in self._along:
            return True
        # Who came back has been let in before, and may have begun its answer: a client waits.
        if self._calls[request_id].flow.line.priority == _BACK:
            return wait_ms <= self._settings.max_wait_ms
        return wait_ms <= self._settings.gate_ms and not crowded

    @property
    def knows_pace(self) -> bool:
        """Whether the pace was measured here, or guessed."""
        return self._drain.known

    def guess(self, pace: float, work: float) -> None:
        """The pace as long as none was measured, in ms of one worker, for calls of so much work. 0: nobody
        has measured anything yet, and what workers say of their wait is a guess: no reason to refuse."""
        if pace > 0.0:
            self._drain.guess(pace, work)
        else:
            self._head_ms = 0.0

    def hold(self, request_id: str, now: float) -> None:
        """It has to wait on."""
        call = self._calls.get(request_id)
        if call is not None:
            self._hold(call.flow, now)

    def took(self, work: float, ms: float) -> None:
        """So much work took so long."""
        self._drain.measured(work, ms)

    def nobody(self) -> None:
        """There is no worker at all. This time says nothing of their pace."""
        self._head_ms = 0.0
        self._drain.end()
        for line in self._lines.values():
            for flow in line.flows.values():
                flow.drain.end()

    def take(self, request_id: str, now: float) -> float:
        """It goes. Returns how many seconds it waited. Those of the same call are next."""
        if request_id in self._along:
            del self._along[request_id]
            return 0.0
        call = self._calls[request_id]
        self._pay(call.flow, call.work, now)
        self._along.update(dict.fromkeys(member for member in call.requests if member != request_id))
        self._gone_key = call.key
        self._remove(call)
        return now - call.since

    def take_part(self, request_id: str, work: float, now: float) -> None:
        """A part of it goes. With the rest it waits on, in its place among its tenant's."""
        call = self._calls[request_id]
        self._pay(call.flow, work, now)
        call.requests[request_id] -= work
        call.flow.work -= work
        call.flow.line.work -= work
        self._hold(call.flow, now)

    def leave(self, request_id: str) -> None:
        """Nobody waits for it any more. Unknown ids are ignored."""
        self._along.pop(request_id, None)
        call = self._calls.get(request_id)
        if call is None:
            return
        if len(call.requests) == 1:
            self._remove(call)
            return
        work = call.requests.pop(request_id)
        self._room.give_back(call.flow.tenant, call.sizes.pop(request_id))
        del self._calls[request_id]
        call.flow.work -= work
        call.flow.line.work -= work

    def next(self) -> str | None:
        """A request whose turn it is; None when nothing waits."""
        if self._along:
            return next(iter(self._along))
        return next(iter(self._first().requests)) if self._calls else None

    def saturation_ms(self) -> float:
        """The predicted wait of a newcomer behind all that wait; 0 when nothing does."""
        if not self._calls:
            return 0.0
        return self._head_ms + self.pace * self.work

    @property
    def work(self) -> float:
        """Of all that wait."""
        return sum(line.work for line in self._lines.values())

    # --- the order ----------------------------------------------------------------------------------

    def _first(self) -> Call:
        line = self._lines[min(self._lines)]
        waiting = [flow for flow in line.flows.values() if flow.calls]
        flow = waiting[0] if len(waiting) == 1 else min(waiting, key=flow_start)
        return next(iter(flow.calls.values()))

    def _full(self, tenant: str, priority: int, work: float, size: int) -> str:
        """What there are too many of for a newcomer; empty when it finds room. Thresholds are dynamic as in
        core/room.py: each flow may have as many calls as there are places left, and each tenant as much
        work."""
        left = self._settings.max_queued - self._waiting
        lines = [line for line in self._lines.values() if tenant in line.flows]
        calls = {line.priority: len(line.flows[tenant].calls) for line in lines}
        own_work = work + sum(line.flows[tenant].work for line in lines)
        if calls.get(priority, 0) >= left or sum(calls.values()) >= TENANT_FLOWS * left:
            return "calls"
        if not self._room.fits(tenant, size):
            return "bytes"
        if own_work > self._settings.max_queued_work - self.work:
            return "characters"
        return ""

    def _newcomers_start(self, line: Line, tenant: str) -> float:
        flow = line.flows.get(tenant)
        if flow is None:
            return line.virtual
        return max(line.virtual, flow.start) + flow.work

    def _predict(self, tenant: str, priority: int, now: float, parts: float = 0.0) -> tuple[float, int]:
        """A newcomer's wait in ms, and how many requests would go before it."""
        ahead, place, own_ms = 0.0, 0.0, 0.0
        for line in self._lines.values():
            if line.priority < priority:
                ahead += line.work
                place += line.calls
            elif line.priority == priority:
                start = self._newcomers_start(line, tenant) + parts
                for flow in line.flows.values():
                    share = 1.0
                    if flow.tenant == tenant:
                        own_ms = flow.own_ms
                    elif flow.work:
                        share = min(1.0, max(0.0, (start - flow.start) / flow.work))
                    ahead += share * flow.work
                    place += share * len(flow.calls)
        share = self.pace / 1e3 * self._recent.per_second_before(priority, now)
        ahead_ms = ahead * self.pace / (1.0 - min(LARGEST_SHARE, share))
        return self._head_ms + max(ahead_ms, own_ms), round(place)

    @property
    def pace(self) -> float:
        """Milliseconds per unit of work; 0 as long as nothing is known."""
        return self._drain.pace / self._workers

    # --- books --------------------------------------------------------------------------------------

    def _add(
        self, request_id: str, key: str, tenant: str, priority: int, work: float, now: float, size: int
    ) -> None:
        line = self._lines.get(priority)
        if line is None:
            line = self._lines[priority] = Line(priority, self._half_s)
        flow = line.flow(tenant)
        call = flow.calls.get(key)
        if call is None:
            if self._calls:
                self._hold(flow, now)
            if not flow.calls:
                flow.start = max(flow.start, line.virtual)
            call = flow.calls[key] = Call(flow, key, now)
            line.calls += 1
            self._waiting += 1
        call.requests[request_id] = work
        call.sizes[request_id] = size
        self._room.take(tenant, size)
        self._calls[request_id] = call
        flow.work += work
        line.work += work

    def _hold(self, flow: Flow, now: float) -> None:
        """Something of this flow has to wait: from now on its pace is measured."""
        self._drain.begin(now)
        flow.drain.begin(now)

    def _pay(self, flow: Flow, work: float, now: float) -> None:
        """So much of this flow goes."""
        flow.line.virtual = flow.start
        flow.start += work
        # Those who came back pass however full the workers are: no measure of their pace.
        if flow.line.priority != _BACK and not self._timed:
            self._drain.took(work, now, self._workers)
        self._recent.took(flow.line.priority, work, now)
        flow.drain.took(work, now)

    def _remove(self, call: Call) -> None:
        flow, line, work = call.flow, call.flow.line, call.work
        self._room.give_back(flow.tenant, sum(call.sizes.values()))
        for request_id in call.requests:
            del self._calls[request_id]
        del flow.calls[call.key]
        line.calls -= 1
        self._waiting -= 1
        flow.work -= work
        line.work -= work
        if not flow.calls:
            flow.work = 0.0  # no rounding errors
            flow.drain = Drain(self._half_s)
        if not line.calls:
            del self._lines[line.priority]
        if not self._calls:
            self._head_ms = 0.0  # of a head that is gone: the next one finds out for itself
            self._drain.end()

    def _refuse(self, reason: str, wait_ms: float, place: int, limit: str = "") -> Refusal:
        """Come back when the wait is within the bound, and not all at the same moment."""
        over_s = max(0.0, wait_ms - ACCEPT_SHARE * self._settings.max_wait_ms) / 1e3
        over_s = min(over_s, MAX_RETRY_S)
        retry_after_s = math.ceil(over_s + self._rng.random() * max(1.0, over_s / 4))
        bound_ms = self._settings.max_wait_ms
        return Refusal(reason, wait_ms, bound_ms, place, float(max(1, retry_after_s)), self._awaited, limit)
