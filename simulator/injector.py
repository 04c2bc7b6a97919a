"""What a fault works with: a target by chance, and what is excused because of the fault."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass

from penstock.shapes import Role
from simulator.clients import Asked
from simulator.processes import SimulatedFrontend, SimulatedWorker
from simulator.watch import Watch
from simulator.world import World

BUSY_SHARE = 0.8
"""The share of faults that choose among workers that have something to do, if there are any."""


@dataclass(slots=True)
class FaultRecord:
    """A fault that happened, and the requests that it met."""

    kind: str
    target: str
    asked: list[Asked]


class Injector:
    """Lets faults happen in a world, and remembers which ones did."""

    def __init__(self, world: World, watch: Watch) -> None:
        self.world = world
        self.watch = watch
        self.records: list[FaultRecord] = []
        self.frozen_s: dict[str, float] = defaultdict(float)  # by frontend: for how long it stood still
        self.lying: set[str] = set()  # frontends that lie, or did
        self._untouchable = next(it for it, role in world.scenario.roles.items() if role.decodes)

    def begins(self, kind: str, target: str, asked: list[Asked]) -> None:
        """A fault begins, and meets these requests."""
        self.world.journal.note("FAULT", kind, target)
        self.records.append(FaultRecord(kind, target, asked))

    def may_go(self, worker: SimulatedWorker) -> bool:
        """Whether this worker may be harmed: in gentle scenarios, one stays well."""
        return not (self.world.scenario.gentle and worker.instance_id == self._untouchable)

    def worker(self, rng: random.Random, *roles: Role) -> SimulatedWorker | None:
        """One that is up and may be harmed, of these roles if any has them; mostly a busy one."""
        up = [it for it in self.world.live_workers() if it.serving and not it.process.held]
        up = [it for it in up if self.may_go(it)]
        fitting = [it for it in up if it.role in roles] or up
        busy = [it for it in fitting if it.worker.attempts]
        if busy and rng.random() < BUSY_SHARE:
            return rng.choice(busy)
        return rng.choice(fitting) if fitting else None

    def frontend(self, rng: random.Random) -> SimulatedFrontend | None:
        """One that runs."""
        there = [it for it in self.world.live_frontends() if not it.process.held]
        return rng.choice(there) if there else None
