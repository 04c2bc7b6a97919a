"""Which requests wait in a frontend for a worker, which goes next, and which are refused.

A request is sent to a worker only while some worker could begin it within `dispatch_wait_ms`. All others
wait here, where a later request of better priority can still go first; an engine's own queue, where none
can, stays short. A request that is predicted to wait longer than `max_wait_ms` is refused when it comes
(core/wait_prediction.py). A request that was let in is never refused afterwards: if others overtake it,
or the prediction was wrong, it waits until its queue deadline (core/deadlines.py).

What waits is a call: the requests for the choices of one client's call, which are let in together and
sent together. Calls go in the order of core/fair_queue.py, with tokens as the unit of work. Requests that
were sent and come back, because their worker was lost or full, go before all others: they were first when
they left.
"""

from __future__ import annotations

from random import Random

import msgspec

from penstock.core.fair_queue import FairQueue, Flow
from penstock.core.wait_prediction import Refusal, WaitPrediction
from penstock.shapes import ModelKey, Request

TENANT_FLOWS = 2
"""A tenant may have this many times as many calls in all priorities together as in one of them."""

OUTPUT_WORK = 4.0
"""Work of an output token, in prompt tokens: on Qwen3-32B (2 x H200) with 64 requests a step, a prompt
token takes 46 us and an output token 200."""

TOKEN_BYTES = 44
"""Of a prompt token: an int object, a place in the request's list and one in its lifecycle's."""

REQUEST_BYTES = 32 * 1024
"""Of a request besides: its connection, tasks and records."""

RETURNED_PRIORITY = -(2**31) - 1
"""Of requests that were sent and came back: before every priority of a client, which has 32 bits."""

_RETURNED_TENANT = "\0"  # no API key has this name


class AdmissionSettings(msgspec.Struct, frozen=True):
    """How long requests may wait, and where."""

    max_wait_ms: float = 10_000.0
    """The longest wait for a worker, its engine's queue included, for which a request is let in. Set it to
    the objective for the time to first token, less what a prompt takes."""

    dispatch_wait_ms: float = 250.0
    """A request is sent while some worker could begin it within this: two or three steps of the largest
    batches, so that no engine runs dry between two reports, and few requests are beyond reordering."""

    max_queued: int = 8192
    """Calls of a model that may wait here, whatever the prediction: as many as a frontend serves at one
    time (frontend/settings.py: max_inflight). A tenant's calls of one priority can fill half of it, which
    leaves room for others."""

    max_queued_bytes: int = 1024 * 1024 * 1024
    """Memory that the requests waiting in a frontend may take, over all models, whatever the prediction:
    some 24 million prompt tokens. A tenant's can fill half of it. The choices of a call are let in
    together, so one call can exceed it, by 4 million tokens at most."""


def work_tokens(prompt_tokens: int, output_tokens: float) -> float:
    """What a request costs its tenant, in prompt tokens."""
    return prompt_tokens + OUTPUT_WORK * output_tokens


def waiting_bytes(request: Request) -> int:
    """The memory that a request takes while it waits."""
    structured = request.sampling.structured
    spec_bytes = len(structured.spec) if structured is not None else 0
    return REQUEST_BYTES + TOKEN_BYTES * len(request.token_ids) + spec_bytes


class MemoryBudget:
    """Bytes that waiting requests take, over all models, by tenant.

    Dynamic thresholds (Choudhury and Hahne, 1998): each tenant may have as much as is left. So a tenant
    that sends a lot leaves some for others, and no request has to be thrown out to make room for them.
    """

    def __init__(self, max_bytes: int) -> None:
        self.used = 0
        self._max_bytes = max_bytes
        self._by_tenant: dict[str, int] = {}

    def fits(self, tenant: str, size: int) -> bool:
        """Whether a newcomer of so many bytes may wait. When nothing waits, any may."""
        return not self.used or self._by_tenant.get(tenant, 0) + size <= self._max_bytes - self.used

    def add(self, tenant: str, size: int) -> None:
        """A request of so many bytes waits, whether it fits or not; with a negative size, it leaves."""
        self.used += size
        own = self._by_tenant.pop(tenant, 0) + size
        if own:
            self._by_tenant[tenant] = own


class AdmissionQueue:
    """The requests for one revision of a model that wait for a worker. Pure; `now` in seconds.

    A request enters (`enter`, or `requeue` when it was sent before). Whenever `next` names it, the router
    looks for a worker for it and either calls `dispatch`, or `hold` if no worker is left to choose from. It
    is out of the queue when `dispatch` lets it go, or with `leave`.
    """

    def __init__(self, settings: AdmissionSettings, rng: Random, memory: MemoryBudget) -> None:
        """`rng` spreads the retries of clients that were refused."""
        self._settings = settings
        self._memory = memory
        self.waiting = FairQueue()  # entries are calls, members are requests
        self.prediction = WaitPrediction(self.waiting, "a worker", settings.max_wait_ms, rng)
        self._entered: dict[str, tuple[float, int]] = {}  # when each of these requests did; its bytes
        self._following: dict[str, None] = {}  # requests whose call was sent, in the order to send them in
        self._sent_key = ""  # the call that was sent last

    def __len__(self) -> int:
        return len(self.waiting)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self.waiting or request_id in self._following

    def others_waiting(self, request_id: str) -> int:
        """How many requests wait beside this one."""
        return len(self.waiting) - (request_id in self.waiting)

    def saturation_ms(self) -> float:
        """The predicted wait of a newcomer behind all that wait; 0 when none does."""
        return self.prediction.head_ms + self.prediction.served_in_ms(self.waiting.work)

    def refusal(
        self, tenant: str, priority: int, now: float, *, call_id: str = "", size: int = 0
    ) -> Refusal | None:
        """Why a newcomer would be refused, whatever work it has; None when it would be let in. `size` in
        bytes, once known. A call that was let in with the first of its choices is let in with all.

        While nothing waits here, no wait is predicted: how long the workers' own queues are shows with the
        first try to send it, and then `hopeless` refuses it if need be."""
        if not self.waiting.entries and self._settings.max_queued and self._memory.fits(tenant, size):
            return self.prediction.refuse(self.prediction.head_ms)
        calls = {flow.priority: flow.entries for flow in self.waiting.flows_of(tenant)}
        own = calls.get(priority, {})
        if call_id and (call_id in own or call_id == self._sent_key):
            return None
        # Thresholds are dynamic as in MemoryBudget: a flow may have as many calls as there are places left.
        left, limit = self._settings.max_queued - self.waiting.entries, ""
        if len(own) >= left or sum(map(len, calls.values())) >= TENANT_FLOWS * left:
            limit = "calls"
        elif not self._memory.fits(tenant, size):
            limit = "bytes"
        return self.prediction.refuse(self.prediction.newcomer_ms(tenant, priority, now), limit)

    def expected_wait_ms(self, tenant: str, priority: int, now: float) -> float:
        """How long a newcomer will wait here, as predicted; 0 while nothing waits."""
        return self.prediction.newcomer_ms(tenant, priority, now) if self.waiting.entries else 0.0

    def hopeless(self, request_id: str) -> Refusal | None:
        """Why a newcomer is refused after the first try to send it: nothing else waits, and the wait at the
        workers alone is too long."""
        if self.waiting.entries != 1 or len(self) != 1 or request_id not in self.waiting:
            return None
        return self.prediction.refuse(self.prediction.head_ms)

    def enter(self, request: Request, work: float, now: float) -> None:
        """Let a newcomer in that `refusal` had nothing against. The requests of a call must enter one
        directly after the other."""
        if request.call_id and request.call_id == self._sent_key:
            self._following[request.request_id] = None
        else:
            key = request.call_id or request.request_id
            self._enter(request, key, request.tenant, request.priority, work, now)

    def requeue(self, request: Request, work: float, now: float) -> None:
        """A request that was sent before is to be sent again. It is never refused here."""
        self._enter(request, request.request_id, _RETURNED_TENANT, RETURNED_PRIORITY, work, now)

    def next(self) -> str | None:
        """The request to be sent next; None when nothing waits."""
        if self._following:
            return next(iter(self._following))
        entry = self.waiting.first()
        return next(iter(entry.members)) if entry is not None else None

    def fits(self, request_id: str, wait_ms: float) -> bool:
        """Whether a request that is next would be sent, see `dispatch`."""
        if request_id in self._following:
            return True
        # A request that came back was let in before and may have begun its answer: its client is waiting.
        if self.waiting[request_id].flow.priority == RETURNED_PRIORITY:
            return wait_ms <= self._settings.max_wait_ms
        return wait_ms <= min(self._settings.dispatch_wait_ms, self._settings.max_wait_ms)

    def dispatch(
        self, request_id: str, wait_ms: float, workers: int, now: float, *, ahead: int
    ) -> float | None:
        """Send the request that is next, if it fits. Returns the seconds for which it waited here; None
        when it has to wait on.

        Args:
            wait_ms: the least time in which one of the workers could begin it.
            workers: how many there are that can end it.
            ahead: how many requests that worker would begin before.
        """
        if request_id in self._following:
            del self._following[request_id]
            return 0.0
        prediction, entry = self.prediction, self.waiting[request_id]
        work = entry.work
        prediction.head_ms = wait_ms
        prediction.servers = max(1, workers)
        if not self.fits(request_id, wait_ms):
            self._measure(entry.flow, now)
            if not prediction.pace.known:
                prediction.pace.guess(wait_ms / (ahead + 1), work)
            return None
        waited_s = now - self._entered[request_id][0]
        self.waiting.charge(entry, work)
        prediction.flow_served(entry.flow, work, now)
        # Requests that came back pass however full the workers are: no measure of their pace.
        if entry.flow.priority != RETURNED_PRIORITY:
            prediction.pace.count(work, now, prediction.servers)
        self._sent_key = entry.key
        self._following.update((member, None) for member in entry.members if member != request_id)
        for member in list(entry.members):
            self._remove(member)
        return waited_s

    def hold(self, request_id: str, workers: int, now: float) -> None:
        """The request that is next has to wait on. Time without any worker says nothing of their pace."""
        if not workers:
            self.prediction.stop()
        elif request_id in self.waiting:
            self._measure(self.waiting[request_id].flow, now)

    def leave(self, request_id: str) -> None:
        """A request need not be sent any more. Unknown ids are ignored."""
        self._following.pop(request_id, None)
        if request_id in self.waiting:
            self._remove(request_id)

    def _enter(
        self, request: Request, key: str, tenant: str, priority: int, work: float, now: float
    ) -> None:
        something_waits = self.waiting.entries > 0
        entry = self.waiting.add(request.request_id, key, tenant, priority, work)
        size = waiting_bytes(request)
        self._entered[request.request_id] = now, size
        self._memory.add(tenant, size)
        if something_waits and len(entry.members) == 1:
            self._measure(entry.flow, now)

    def _measure(self, flow: Flow, now: float) -> None:
        """Something of this flow has to wait: from now on the paces are measured."""
        self.prediction.pace.start(now)
        self.prediction.flow_waits(flow, now)

    def _remove(self, request_id: str) -> None:
        flow = self.waiting.remove(request_id)
        _, size = self._entered.pop(request_id)
        self._memory.add(flow.tenant, -size)
        self.prediction.flow_shrank(flow)
        if not self.waiting.entries:
            self.prediction.stop()


class AdmissionQueues(dict[ModelKey, AdmissionQueue]):
    """The queues of all models. Requests of one revision do not wait behind those of another, whose
    workers they could not use. All share one budget of memory."""

    def __init__(self, settings: AdmissionSettings, rng: Random) -> None:
        super().__init__()
        self._settings = settings
        self._rng = rng
        self._memory = MemoryBudget(settings.max_queued_bytes)

    def of(self, model: ModelKey) -> AdmissionQueue:
        """The queue of this revision, made when it is first asked for."""
        queue = self.get(model)
        if queue is None:
            queue = self[model] = AdmissionQueue(self._settings, self._rng, self._memory)
        return queue
