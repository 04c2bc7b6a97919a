"""Whether workers that do not answer are routed around in time.

From the moment on in which a frontend could know that a worker has work and does nothing, it may send it
no further attempt for as long as that lasts, once its patience is over.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

from msgspec.structs import replace

from penstock.core.progress import Progress, ProgressLimits
from penstock.wire.messages import Generate, Hello
from simulator.network import Route, first_message
from simulator.processes import SimulatedFrontend, SimulatedWorker
from simulator.world import World

LOOK_S = 1.0
"""How much later than its own patience a frontend may find out: ticks, heartbeats and delays."""

SILENCE_S = 3.0
"""Within which a silent worker is found."""

AFTERMATH_S = 15.0
"""How long after the end of a fault links may still end because of it: what was late arrives, deadlines
pass, and frontends connect again after a pause."""


class Seen(Enum):
    """From when on a frontend can know that a worker does not answer."""

    AT_ONCE = "silence"
    WHEN_BUSY = "work that is not done"
    WHEN_SENT_TO = "no sign that it arrived"


@dataclass(slots=True, eq=False)
class _Suspicion:
    """One fault's: this worker does not answer these frontends."""

    worker: SimulatedWorker
    seen: Seen
    bound_s: float
    since: dict[str, float | None]  # by frontend: when it could know; None: not yet
    late_s: dict[str, float] = field(default_factory=dict)  # by how much news from it came later meanwhile


class Watch:
    """Sees what frontends send to workers that do not answer. Each fault is watched by itself: where some
    meet, the end of one changes nothing for the others."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._open: list[_Suspicion] = []
        self._disturbing = 0  # faults that end links, going on now
        self._disturbed_until = -math.inf

    @contextmanager
    def suspecting(
        self,
        workers: Iterable[SimulatedWorker],
        frontends: Iterable[SimulatedFrontend] | None = None,
        *,
        seen: Seen,
    ) -> Iterator[None]:
        """These workers do not answer these frontends, all if not given: they must be routed around."""
        names = [it.name for it in (self._world.frontends if frontends is None else frontends)]
        now = self._world.loop.time()
        opened = []
        for worker in workers:
            at_once = seen is Seen.AT_ONCE or (seen is Seen.WHEN_BUSY and _busy(worker))
            since: dict[str, float | None] = dict.fromkeys(names, now if at_once else None)
            opened.append(_Suspicion(worker, seen, self._bound_s(worker), since))
        self._open += opened
        if self._on_write not in self._world.network.taps:
            self._world.network.taps.append(self._on_write)
        try:
            yield
        finally:
            self._open = [suspicion for suspicion in self._open if suspicion not in opened]
            if not self._open and self._on_write in self._world.network.taps:
                self._world.network.taps.remove(self._on_write)

    @contextmanager
    def disturbed(self) -> Iterator[None]:
        """During a fault that may end links without a mistake of a worker or a frontend."""
        self._disturbing += 1
        try:
            yield
        finally:
            self._disturbing -= 1
            self._disturbed_until = self._world.loop.time() + AFTERMATH_S

    def forgive(self, frontend: str) -> None:
        """This frontend stood still until now: its patience begins again."""
        for suspicion in self._open:
            if suspicion.since.get(frontend) is not None:
                suspicion.since[frontend] = self._world.loop.time()

    def _on_write(self, route: Route, data: bytes) -> bytes:
        frontend, instance_id = route
        for suspicion in self._open:
            worker = suspicion.worker
            if frontend == worker.instance_id:  # it is the worker that says something, to a frontend
                slower_s = self._world.network.slower_s.get(route, 0.0)
                suspicion.late_s[route[1]] = max(slower_s, suspicion.late_s.get(route[1], 0.0))
            if worker.instance_id != instance_id or frontend not in suspicion.since or worker.exited:
                continue
            if suspicion.seen is Seen.WHEN_BUSY and not _busy(worker):
                # Its last attempt was taken away, and it said so: it looks idle until it has work again.
                suspicion.since = dict.fromkeys(suspicion.since)
            message = first_message(data)
            if isinstance(message, Hello):
                self._reconnected(suspicion, frontend)
            elif isinstance(message, Generate):
                self._sent_to(suspicion, frontend)
        return data

    def _reconnected(self, suspicion: _Suspicion, frontend: str) -> None:
        """What was known of a worker goes with its link, if it was not this frontend that ended it without
        need; the snapshot says again whether there is work."""
        if self._disturbing or self._world.loop.time() < self._disturbed_until:
            suspicion.since[frontend] = self._world.loop.time() if _busy(suspicion.worker) else None

    def _sent_to(self, suspicion: _Suspicion, frontend: str) -> None:
        now, since = self._world.loop.time(), suspicion.since[frontend]
        if since is None:
            suspicion.since[frontend] = now
        elif now - since > suspicion.bound_s + suspicion.late_s.get(frontend, 0.0):
            self._world.journal.violate(
                "routed around",
                f"{frontend} sends to {suspicion.worker.instance_id}, which does not answer since "
                f"{now - since:.3f} s",
            )

    def _bound_s(self, worker: SimulatedWorker) -> float:
        """What a frontend's patience with this engine can be, at most."""
        settings = self._world.scenario.sim.scheduler
        load = worker.worker.load()
        progress = Progress(ProgressLimits(), settings.max_batch_tokens)
        progress.observe(replace(load, prefill_tokens=settings.max_batch_tokens), 0.0)
        return max(SILENCE_S, progress.patience_s()) + LOOK_S


def _busy(worker: SimulatedWorker) -> bool:
    """Whether it has attempts, and its engine stands in a step. One that only waits for pulls takes a turn
    with each attempt that comes, and so looks well."""
    return bool(worker.worker.attempts) and worker.engine.in_step
