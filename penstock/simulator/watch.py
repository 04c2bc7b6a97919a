"""Whether workers that do not answer are routed around in time.

From the moment on in which a frontend could know that a worker has work and does nothing, it may send it
no further attempt for as long as that lasts, once its patience is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING

from msgspec.structs import replace

from penstock.core.progress import Progress, ProgressLimits
from penstock.simulator.network import Route, first_message
from penstock.wire.messages import Generate, Hello

if TYPE_CHECKING:
    from penstock.simulator.lab import Lab
    from penstock.simulator.parts import SimWorker

LOOK_S = 1.0
"""How much later than its own patience a frontend may find out: ticks, heartbeats and delays."""

SILENCE_S = 3.0
"""Within which a silent worker is found."""


ORPHANS_S = 3.0
"""Within which a worker ends attempts whose frontend is gone."""


class Seen(Enum):
    """From when on a frontend can know that a worker does not answer."""

    AT_ONCE = "silence"
    WHEN_BUSY = "work that is not done"
    WHEN_SENT_TO = "no sign that it arrived"


class Watch:
    """Sees what frontends send to workers that do not answer."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._since: dict[Route, float | None] = {}  # when it had work; None: not yet
        self._bounds_s: dict[str, float] = {}  # by worker

    @contextmanager
    def suspecting(
        self, workers: Iterable[SimWorker], frontends: Iterable[str], seen: Seen
    ) -> Iterator[None]:
        """These workers do not answer these frontends."""
        now = self._lab.loop.time()
        routes = []
        for worker in workers:
            self._bounds_s[worker.instance_id] = self._bound_s(worker)
            busy = worker.worker.health()["attempts"] > 0
            at_once = seen is Seen.AT_ONCE or (seen is Seen.WHEN_BUSY and busy)
            for name in frontends:
                routes.append((name, worker.instance_id))
                self._since[name, worker.instance_id] = now if at_once else None
        if self._on_write not in self._lab.network.taps:
            self._lab.network.taps.append(self._on_write)
        try:
            yield
        finally:
            for route in routes:
                self._since.pop(route, None)
            if not self._since and self._on_write in self._lab.network.taps:
                self._lab.network.taps.remove(self._on_write)

    def forgive(self, frontend: str) -> None:
        """This frontend could not find out anything."""
        for route in [route for route in self._since if route[0] == frontend]:
            self._since[route] = None

    async def orphans_forever(self) -> None:
        """Look for attempts that nobody waits for."""
        since: dict[str, float] = {}
        while True:
            await asyncio.sleep(ORPHANS_S / 4)
            orphans = {name for worker in self._lab.live_workers() for name in _orphans(worker)}
            now = self._lab.loop.time()
            since = {name: since.get(name, now) for name in sorted(orphans)}
            for name, first in since.items():
                if now - first > ORPHANS_S:
                    self._lab.violate("orphans end", f"{name} runs since {first:.3f}, for nobody")

    def _on_write(self, route: Route, data: bytes) -> bytes:
        if route not in self._since:
            return data
        message = first_message(data)
        if isinstance(message, Hello):
            self._since[route] = None  # what was known of it went with the old link
        elif isinstance(message, Generate):
            now, since = self._lab.loop.time(), self._since[route]
            if since is None:
                self._since[route] = now
            elif now - since > self._bounds_s[route[1]]:
                self._lab.violate(
                    "routed around",
                    f"{route[0]} sends to {route[1]}, which does not answer since {now - since:.3f} s",
                )
        return data

    def _bound_s(self, worker: SimWorker) -> float:
        """What a frontend's patience with this engine can be, at most."""
        settings = self._lab.scenario.sim.scheduler
        load = worker.worker.load()
        progress = Progress(ProgressLimits(), settings.max_batch_tokens)
        progress.observe(replace(load, prefill_tokens=settings.max_batch_tokens), 0.0)
        return max(SILENCE_S, progress.patience_s()) + LOOK_S


def _orphans(worker: SimWorker) -> list[str]:
    """Attempts whose frontend's link has ended, on a worker that could do something about it."""
    if not worker.serving or worker.process.held or worker.clock.wedged:
        return []
    shell = worker.worker
    peers = set(shell._server.peers)
    return [f"{worker.instance_id} {name}" for name, peer in shell._owners.items() if peer not in peers]
