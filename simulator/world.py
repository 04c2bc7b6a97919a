"""The simulated world: virtual time, a network, a directory, and the processes that run in it.

It knows no fault and no check. Faults change it, checks look at it, and the lab (lab.py) puts all together.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections import Counter
from collections.abc import Coroutine
from typing import Any

from penstock.core.overlap_check import Cause
from penstock.shapes import Role
from simulator.checked_transfer import CheckedTransferNetwork
from simulator.clients import Asked, SimulatedCall
from simulator.directory import Directory
from simulator.journal import Journal
from simulator.loop import Process, VirtualLoop
from simulator.network import Network
from simulator.processes import FrontendChecks, Models, SimulatedFrontend, SimulatedWorker, Surroundings
from simulator.scenario import Scenario


class World:
    """Everything that runs, and what it runs in."""

    def __init__(self, scenario: Scenario, loop: VirtualLoop, journal: Journal) -> None:
        self.scenario = scenario
        self.loop = loop
        self.journal = journal
        self.frontend_checks: FrontendChecks  # set before the first frontend is started
        self.generation = 0  # of new workers (Scenario.sim_of)
        self.asked: list[Asked] = []  # all requests of all clients
        self.workers: dict[str, SimulatedWorker] = {}  # the latest incarnations
        self.frontends: list[SimulatedFrontend] = []  # likewise
        self.restarting = 0  # workers that have ended and will be started again
        self.network = Network(
            loop, random.Random(f"network {scenario.seed}"), journal.note, scenario.latency_s
        )
        loop.network = self.network
        self.directory = Directory(random.Random(f"directory {scenario.seed}"), journal.note)
        self.transfers = CheckedTransferNetwork(self.network, self._process, journal)
        self.models = Models(scenario, self.workers)
        self._context = contextvars.copy_context()
        self._surroundings = Surroundings(
            scenario, loop, self._context, journal, self.network, self.directory, self.transfers
        )
        self._epochs: Counter[str] = Counter()
        self._names = len(scenario.roles)
        self.closing = False  # no worker is started again
        self._tasks: list[asyncio.Task[Any]] = []

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run something that no process does."""
        self._tasks.append(self.loop.create_task(coroutine, context=self._context.copy()))

    # --- who is there -----------------------------------------------------------------------------------

    def live_workers(self) -> list[SimulatedWorker]:
        return [worker for worker in self.workers.values() if not worker.exited]

    def live_frontends(self) -> list[SimulatedFrontend]:
        return [frontend for frontend in self.frontends if not frontend.exited]

    def calm(self, frontend: SimulatedFrontend, worker: SimulatedWorker) -> bool:
        """Whether what these two say to each other arrives, and soon."""
        network = self.network
        there, back = (frontend.name, worker.instance_id), (worker.instance_id, frontend.name)
        return not (
            network.blocked(*there)
            or network.blocked(*back)
            or there in network.slower_s
            or back in network.slower_s
            or frontend.process.read_bytes_per_s
            or worker.process.read_bytes_per_s
        )

    def _process(self, name: str) -> Process | None:
        worker = self.workers.get(name)
        return worker.process if worker is not None else None

    # --- workers and frontends begin --------------------------------------------------------------------

    def add_worker(self, role: Role) -> SimulatedWorker:
        """Scale up."""
        self._names += 1
        return self.start_worker(f"w{self._names}", role)

    def start_worker(
        self,
        instance_id: str,
        role: Role,
        generation: int | None = None,
        false_events: Cause | None = None,
    ) -> SimulatedWorker:
        """Start a new incarnation, of the newest generation if no other is given. `false_events`: what is
        wrong with what it tells of its cache."""
        if generation is None:
            generation = self.generation
        self._epochs[instance_id] += 1
        epoch, version = self._epochs[instance_id], self.models.newest
        self.journal.note("start", instance_id, role.value, epoch, version, generation)
        worker = SimulatedWorker(
            self._surroundings,
            instance_id,
            role,
            epoch,
            version,
            generation,
            false_events=false_events,
            poison=self._failing_steps,
            restart=lambda worker, after_s: self.spawn(self.restart(worker, after_s)),
        )
        self.workers[instance_id] = worker
        return worker

    async def restart(self, worker: SimulatedWorker, after_s: float) -> None:
        """Start it again, unless that has happened already."""
        self.restarting += 1
        await asyncio.sleep(after_s)
        self.restarting -= 1
        if self.workers[worker.instance_id] is worker and not self.closing:
            self.start_worker(worker.instance_id, worker.role)

    def close(self) -> None:
        """From now on no worker is started again."""
        self.closing = True

    def start_frontend(self, place: int, same_requests: bool = False) -> SimulatedFrontend:
        """Start a frontend, or its next incarnation; with `same_requests` it names requests as that did."""
        old = self.frontends[place] if place < len(self.frontends) else None
        incarnation = old.incarnation + 1 if old is not None else 1
        first = 0 if same_requests or old is None else incarnation * 10_000
        self.journal.note("start", f"f{place}", incarnation)
        frontend = SimulatedFrontend(
            self._surroundings, self.models, self.frontend_checks, f"f{place}", incarnation, first
        )
        self.frontends[place : place + 1] = [frontend]
        return frontend

    # --- requests ---------------------------------------------------------------------------------------

    def ask(self, frontend: SimulatedFrontend, call: SimulatedCall) -> list[Asked]:
        """A client sends a call to this frontend."""
        asked = frontend.ask(call)
        self.asked += asked
        return asked

    def flying(self, instance_id: str | None = None, frontend: str | None = None) -> list[Asked]:
        """Requests that have not ended: of one worker, of one frontend, or all."""
        where = {
            request_id: record.life.instance_id
            for it in self.live_frontends()
            for request_id, record in it.router.dispatcher.records.items()
        }
        return [
            asked
            for asked in self.asked
            if not asked.ended
            and (frontend is None or asked.frontend == frontend)
            and (instance_id is None or where.get(asked.request.request_id) == instance_id)
        ]

    def _failing_steps(self, attempt_id: str) -> int:
        """How many steps in a row an attempt makes fail that is computed now."""
        request_id = attempt_id.rpartition(".")[0]
        for frontend in self.live_frontends():
            asked = frontend.asked.get(request_id)
            if asked is not None and asked.poison_steps:
                return asked.poisons(request_id)
        return 0
