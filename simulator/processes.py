"""The processes of a simulation: workers and frontends, as `assembly.py` puts them together."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from msgspec.structs import replace

from penstock.core.dispatcher import RequestRecord
from penstock.core.overlap_check import Cause
from penstock.errors import PenstockError, RequestRejected
from penstock.metrics import Metrics
from penstock.router.router import Router
from penstock.shapes import Attempt, Incarnation, ModelKey, ModelView, Request, Role
from penstock.worker.worker import Worker, WorkerSettings
from simulator.checked_engine import CheckedEngine, EngineClock
from simulator.checked_transfer import CheckedTransfer, CheckedTransferNetwork
from simulator.clients import Asked, Oracle, SimulatedCall
from simulator.directory import Directory, SimDiscovery
from simulator.false_teller import FalseTeller
from simulator.journal import Journal
from simulator.loop import Process, VirtualLoop
from simulator.network import Network
from simulator.scenario import BLOCK_SIZES, Scenario

RESTART_S = 1.0
"""Until a supervisor starts a worker again that ended by itself."""

PREPARE_S = 0.05
"""That a frontend takes to load a model's tokenizer."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a process runs in."""

    scenario: Scenario
    loop: VirtualLoop
    context: contextvars.Context  # of what no process does
    journal: Journal
    network: Network
    directory: Directory
    transfers: CheckedTransferNetwork


class SimulatedWorker:
    """One incarnation of a worker, from its start to its exit.

    Args:
        version: of its model.
        generation: of its settings (Scenario.sim_of).
        false_events: what is wrong with what it tells of its cache.
        poison: how many steps in a row an attempt makes fail.
        restart: starts it again after so many seconds, as a supervisor does when it ended by itself.
    """

    def __init__(
        self,
        surroundings: Surroundings,
        instance_id: str,
        role: Role,
        epoch: int,
        version: int,
        generation: int,
        *,
        false_events: Cause | None,
        poison: Callable[[str], int],
        restart: Callable[[SimulatedWorker, float], None],
    ) -> None:
        self.instance_id = instance_id
        self.role = role
        self.epoch = epoch
        self.version = version
        self.generation = generation
        self.process = Process(surroundings.loop, instance_id)
        self.false_events = false_events
        self.exited = ""  # how
        self.leaving = False
        self.clock = EngineClock(self.process)
        self.engine: CheckedEngine
        self.worker: Worker
        self.transfer: CheckedTransfer | None = None
        self._surroundings = surroundings
        self._journal = surroundings.journal
        self._poison = poison
        self._restart = restart
        self._leaves_at = 0.0
        self._stop: asyncio.Event
        self.main = self.process.spawn(self._run(), f"worker {instance_id}")
        self.main.add_done_callback(lambda task: self._exit("left"), context=surroundings.context)

    @property
    def up(self) -> bool:
        """Whether it has started and not begun to leave."""
        return not self.exited and not self.leaving

    @property
    def serving(self) -> bool:
        """Whether it is up and has said so."""
        return self.up and hasattr(self, "worker") and self.worker.status == "healthy"

    @property
    def revision(self) -> str:
        """Of its model; empty before its engine has started."""
        return self.worker.revision if hasattr(self, "worker") else ""

    @property
    def stands_still(self) -> bool:
        """Whether a fault holds its process or its engine."""
        return self.process.held or self.clock.wedged

    def leave(self) -> None:
        """As on SIGTERM."""
        self.leaving = True
        self.process.soon(self._on_sigterm)

    def _on_sigterm(self) -> None:
        self._leaves_at = self.process.clock.now() + self._surroundings.scenario.drain_s
        self._stop.set()

    def _stopping(self) -> None:
        left = self.engine.scheduler.statistics()
        if (left.attempts or left.held_handoffs) and not self.engine.dead:
            left_s = self._leaves_at - self.process.clock.now()
            if left_s > 0:
                what = f"{self.instance_id} stops with {left.attempts} attempts, "
                what += f"{left.held_handoffs} handoffs and {left_s:.3f} s to drain"
                self._journal.violate("drains", what)

    def kill(self) -> None:
        """As on SIGKILL."""
        self._exit("killed")

    async def _run(self) -> None:
        surroundings, scenario = self._surroundings, self._surroundings.scenario
        self._stop = asyncio.Event()
        if self.role is not Role.AGGREGATED:
            self.transfer = CheckedTransfer(
                scenario.transfer, surroundings.transfers, self.process, self._wrong
            )
        sim = scenario.sim_of(self.version, self.generation)
        incarnation = Incarnation(self.instance_id, self.epoch)
        scheduler = replace(sim.scheduler, holder=incarnation)
        self.engine = CheckedEngine(
            replace(sim, scheduler=scheduler),
            self.clock,
            self.transfer,
            self._wrong,
            lambda what: self._journal.violate("no block leaked", f"{self.instance_id}: {what}"),
            self._stopping,
            self._poison,
        )
        if self.false_events is not None:
            size = next(size for size in BLOCK_SIZES if size != sim.block_size)
            blocks = sim.total_blocks * sim.block_size // size
            self.engine.teller = FalseTeller(self.false_events, sim.model, size, blocks)
        if self.transfer is not None:
            self.transfer.pool = lambda: self.engine.scheduler.pool
        self.worker = Worker(
            self.engine,
            SimDiscovery(surroundings.directory),
            WorkerSettings(
                incarnation,
                self.role,
                max_waiting=scenario.max_waiting,
                max_wait_ms=scenario.max_wait_ms,
                drain_s=scenario.drain_s,
            ),
            dataclasses.replace(scenario.server, host=self.instance_id),
            self.process.clock,
        )
        try:
            await self.worker.run(self._stop)
        except PenstockError as error:
            self._journal.note("worker failed", self.instance_id, error)

    def _wrong(self, what: str) -> None:
        self._journal.violate("wrong KV", f"{self.instance_id}: {what}")

    def _exit(self, how: str) -> None:
        if self.exited:
            return
        journal = self._journal
        if how == "left" and not self.main.cancelled():
            error = self.main.exception()
            if error is not None:
                journal.violate("no crash", f"{self.instance_id} ends with {error!r}")
            leaked = [name for name in self.process.running_tasks() if self.leaving]
            if leaked:
                journal.violate(
                    "no task leaked", f"{self.instance_id} left, and its tasks did not: {leaked}"
                )
        self.exited = how
        self.process.dead = True
        journal.note("exit", self.instance_id, self.epoch, how)
        self._surroundings.network.killed(self.process)
        if self.transfer is not None:
            self.transfer.kill()
        if how == "left" and not self.leaving:
            self._restart(self, RESTART_S)


class Models:
    """The two versions of the model that can be served."""

    def __init__(self, scenario: Scenario, workers: Mapping[str, SimulatedWorker]) -> None:
        self.newest = 0  # the version that new workers serve
        self.oracles = [Oracle(scenario.sim), Oracle(scenario.replaced_sim)]  # by version
        self._workers = workers
        self._revisions: dict[int, str] = {}  # by version, as far as they are known

    def revision(self, version: int) -> str:
        """Of this version of the model, as the workers that can decode have it."""
        for worker in self._workers.values():
            if worker.role.decodes and worker.revision:
                self._revisions[worker.version] = worker.revision
        return self._revisions.get(version, "")


class FrontendChecks(Protocol):
    """Looks at what a frontend does, in the moment in which it does it."""

    def sending(
        self, frontend: SimulatedFrontend, record: RequestRecord, instance_id: str, attempt: Attempt
    ) -> None:
        """It is about to send this attempt."""

    def refused(self, frontend: SimulatedFrontend, request_id: str, why: str) -> None:
        """It has refused this request because of an overload."""


class _ObservedRouter(Router):
    """Calls `sending` with every attempt before it is sent."""

    def __init__(
        self, sending: Callable[[RequestRecord, str, Attempt], None], *args: Any, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._sending = sending

    def send(self, record: RequestRecord, instance_id: str, attempt: Attempt) -> None:
        self._sending(record, instance_id, attempt)
        super().send(record, instance_id, attempt)


class SimulatedFrontend:
    """One incarnation of a frontend, with the clients that it serves.

    Args:
        first_request: the number before that of its first request.
    """

    def __init__(
        self,
        surroundings: Surroundings,
        models: Models,
        checks: FrontendChecks,
        name: str,
        incarnation: int,
        first_request: int,
    ) -> None:
        self.name = name
        self.process = Process(surroundings.loop, name)
        self.incarnation = incarnation
        self.exited = ""
        self.asked: dict[str, Asked] = {}  # by request id
        self.sent_calls: set[str] = set()
        self._numbers = first_request
        self._surroundings = surroundings
        self._models = models
        self._checks = checks
        scenario = surroundings.scenario
        self.router = _ObservedRouter(
            partial(checks.sending, self),
            SimDiscovery(surroundings.directory),
            scenario.router,
            scenario.client,
            Metrics().router,
            frontend_id=name,
            clock=self.process.clock,
            rng=random.Random(f"{scenario.seed} {name} {incarnation}"),
        )
        self.main = self.process.spawn(self.router.run(self._prepare), f"router {name}")
        self.main.add_done_callback(self._ended, context=surroundings.context)

    async def _prepare(self, model: ModelView) -> None:
        await self.process.clock.sleep(PREPARE_S)

    def _ended(self, main: asyncio.Task[None]) -> None:
        if not main.cancelled():
            self._surroundings.journal.violate("no crash", f"{self.name} ends with {main.exception()!r}")

    def ask(self, call: SimulatedCall) -> list[Asked]:
        """The requests of a client's call. They are submitted once the process runs."""
        asked = []
        journal, now = self._surroundings.journal, self._surroundings.loop.time
        call_id = f"call-{self.name}-{self._numbers}"
        for sampling in call.samplings:
            self._numbers += 1
            request = Request(
                f"{self.name}-{self._numbers}",
                # Its revision is known once it is submitted.
                ModelKey(self._surroundings.scenario.sim.model, ""),
                list(call.token_ids),
                sampling,
                cache_salt=call.cache_salt,
                priority=call.priority,
                tenant=f"tenant-{call.frontend % 3}",
                call_id=call_id,
            )
            it = Asked(request, self.name, now(), journal.note, journal.violate, now)
            it.refused = partial(self._checks.refused, self)
            it.begin_again = self._begin_again
            asked.append(it)
            self.asked[request.request_id] = it
            self.process.soon(self._submit, it, call.hang_up_s)
        return asked

    def _begin_again(self, asked: Asked) -> None:
        """Its model was replaced: tokenized anew, as frontends do, it gets another name."""
        before, asked.beginnings = asked.request, asked.beginnings + 1
        asked.request = replace(
            before,
            request_id=f"{before.request_id}-again{asked.beginnings}",
            call_id=f"{before.call_id}-again{asked.beginnings}",
        )
        asked.sends = 0
        self.asked[asked.request.request_id] = asked
        self.process.soon(self._submit, asked, None)

    def _version(self) -> int:
        """Of the model that this frontend takes requests for."""
        sim = self._surroundings.scenario.sim
        try:
            eos_token_ids = self.router.model(sim.model).card.eos_token_ids
        except RequestRejected:  # it knows no worker yet, and clients do not wait for that
            return self._models.newest
        return int(eos_token_ids != list(sim.eos_token_ids))

    def _submit(self, asked: Asked, hang_up_s: float | None) -> None:
        if asked.ended:
            return
        version = self._version()
        loop = self._surroundings.loop
        age_s = loop.time() - asked.at
        model = asked.request.model._replace(revision=self._models.revision(version))
        asked.request = replace(asked.request, model=model, age_s=age_s)
        prompt, sampling = asked.request.token_ids, asked.request.sampling
        asked.wanted, asked.reason = self._models.oracles[version].answer(len(prompt), sampling)
        try:
            ticket = self.router.submit(asked.request, asked.on_delta, asked.on_error)
        except RequestRejected as error:
            asked.on_error(error)
            return

        def cancel() -> None:
            if not asked.ended:
                asked.end("hung up")
                ticket.cancel()

        asked.cancel = cancel
        asked.ticket = ticket
        asked.failures = lambda: ticket.record.life.strikes.lost
        if hang_up_s is not None:
            self.process.soon(loop.call_later, hang_up_s, asked.hang_up)

    def leave(self) -> None:
        """End in order."""
        self.process.soon(self.main.cancel)

    def kill(self) -> None:
        """As on SIGKILL: its clients hear of it from their own systems."""
        self.exited = "killed"
        self.process.dead = True
        self._surroundings.journal.note("exit", self.name, self.incarnation, "killed")
        self._surroundings.network.killed(self.process)
        for asked in self.asked.values():
            if not asked.ended:
                asked.end("lost with its frontend")
