"""One simulation, from its scenario to its verdict."""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import logging
import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from time import process_time
from typing import Any

from penstock.core.deadlines import Awaited, Deadlines
from penstock.core.suspects import MAX_DEATHS
from penstock.shapes import Role, Sampling
from simulator import checks
from simulator.directory import Directory
from simulator.engine import InjectedFault, LabTransferNetwork
from simulator.faults import FAULTS, LEAVES_LINKS
from simulator.loop import Process, StandsStill, VirtualLoop
from simulator.monitor import Monitor
from simulator.network import Network
from simulator.parts import SimFrontend, SimWorker
from simulator.scenario import PlannedFault, Scenario
from simulator.watch import Seen, Watch
from simulator.workload import Asked, Call, Oracle

LAST_EVENTS = 40
"""Events that a violation is shown with."""

SETTLE_S = 90.0
"""Longest time in which everything must be put in order once requests have ended and faults are over: a
handoff's life, a pull, a lease, a refused connection's pause."""

QUIET_SETTLE_S = 1.8
"""The same where nothing went wrong: less than any handoff's life."""

LOOK_S = 0.25
LATE_S = 1.0
"""How much later than its deadline a request may end: ticks, and a frontend that catches up."""

ERRORS_ALLOWED = {
    "attempts_failed",
    "kills_workers",
    "model_replaced",
    "no_worker",
    "overloaded",
    "request_timeout",
} | {f"{awaited.value}_timeout" for awaited in Awaited}
"""In scenarios that are not gentle."""

MOST_DOSES = MAX_DEATHS + Deadlines().max_attempts
"""Steps that one request may make fail."""

NOT_SERVED = {"hung up", "lost with its frontend"}
"""Ends that say nothing about the workers."""


@dataclass(slots=True)
class Violation:
    """An invariant, and how it was broken."""

    invariant: str
    detail: str
    at: float


@dataclass(slots=True)
class FaultRecord:
    """A fault that happened, and the requests that it met."""

    kind: str
    target: str
    asked: list[Asked]


@dataclass(slots=True)
class Outcome:
    """What became of one seed."""

    seed: int
    violation: Violation | None
    digest: str  # of everything that happened, in order
    virtual_s: float
    cpu_s: float
    callbacks: int
    asked: list[Asked] = field(default_factory=list)
    faults: list[FaultRecord] = field(default_factory=list)
    last_events: list[str] = field(default_factory=list)


class Lab:
    """Everything in one simulation.

    Args:
        trace: gets every event as a line, as it happens.
    """

    def __init__(self, scenario: Scenario, trace: Callable[[str], None] | None = None) -> None:
        self.scenario = scenario
        self.loop = VirtualLoop(scenario.callback_s)
        self.context = contextvars.copy_context()
        self.over = False
        self.violation: Violation | None = None
        self.version = 0  # of the model that new workers serve
        self.generation = 0  # of new workers (Scenario.sim_of)
        self.revisions: dict[int, str] = {}  # of the model, by version
        self.oracles = [Oracle(scenario.sim), Oracle(scenario.replaced_sim)]  # by version
        self.asked: list[Asked] = []
        self.faults: list[FaultRecord] = []
        self.workers: dict[str, SimWorker] = {}  # the latest incarnations
        self.frontends: list[SimFrontend] = []
        self.untouchable = next(it for it, role in scenario.roles.items() if role.decodes)
        self._trace = trace
        self._digest = hashlib.blake2b(digest_size=8)
        self._last: deque[tuple[float, tuple[Any, ...]]] = deque(maxlen=LAST_EVENTS)
        self._offers: Counter[str] = Counter()  # handoffs that were offered and not yet pulled
        self._tasks: list[asyncio.Task[Any]] = []
        self._epochs: Counter[str] = Counter()
        self._failed = asyncio.Event()
        self._restarting = 0
        self._leaving = False
        self.frozen_s: dict[str, float] = defaultdict(float)  # by frontend
        self.lying: set[str] = set()  # frontends that lie, or did
        self._names = len(scenario.roles)
        self.doses: Counter[str] = Counter()  # steps that failed, by the request to blame
        network_rng = random.Random(f"network {scenario.seed}")
        self.network = Network(self.loop, network_rng, self.note, scenario.latency_s)
        self.loop.network = self.network
        self.watch = Watch(self)
        self.monitor = Monitor(self)
        self.directory = Directory(random.Random(f"directory {scenario.seed}"), self.note)
        self.transfers = LabTransferNetwork(self.network, self._process)

    # --- what happens -------------------------------------------------------------------------------------

    def note(self, *event: Any) -> None:
        """An event, for the digest, the trace and whoever looks for the cause of a violation."""
        if self.over:
            return
        now = self.loop.time()
        self._digest.update(f"{now:.9f} {event}".encode())
        self._last.append((now, event))
        if self._trace is not None:
            self._trace(_line(now, event))

    def violate(self, invariant: str, detail: str) -> None:
        """Something is as it must never be. The first such thing ends the simulation."""
        if self.violation is None and not self.over:
            self.note("VIOLATION", invariant, detail)
            self.violation = Violation(invariant, detail, self.loop.time())
            self._failed.set()

    def offered(self, handoff_id: str) -> None:
        """A reader may read this handoff."""
        self._offers[handoff_id] += 1

    def pulled(self, handoff_id: str) -> None:
        """A reader has read it to its end."""
        self.note("pulled", handoff_id)
        self._offers[handoff_id] -= 1
        if self._offers[handoff_id] < 0:
            self.violate("handoffs are pulled once", f"{handoff_id} was pulled again")

    def poisoned(self, attempt_id: str) -> int:
        """How many steps in a row an attempt makes fail, if it is computed."""
        request_id = attempt_id.rpartition(".")[0]
        for frontend in self.live_frontends():
            if request_id in frontend.poison:
                self.doses[request_id] += 1
                if self.doses[request_id] > MOST_DOSES:
                    self.violate(
                        "poison is stopped", f"{request_id} fails {self.doses[request_id]} engines"
                    )
                return frontend.poison[request_id]
        return 0

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Something that the lab itself does."""
        self._tasks.append(self.loop.create_task(coroutine, context=self.context.copy()))

    # --- who is there -------------------------------------------------------------------------------------

    def live_workers(self) -> list[SimWorker]:
        return [worker for worker in self.workers.values() if not worker.exited]

    @property
    def restarting(self) -> int:
        """Workers that have ended and will be there again."""
        return self._restarting

    def live_frontends(self) -> list[SimFrontend]:
        return [frontend for frontend in self.frontends if not frontend.exited]

    def calm(self, frontend: SimFrontend, worker: SimWorker) -> bool:
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

    def add_worker(self, role: Role) -> SimWorker:
        """Scale up."""
        self._names += 1
        return self.start_worker(f"w{self._names}", role)

    def start_worker(self, instance_id: str, role: Role, generation: int | None = None) -> SimWorker:
        """A new incarnation, of the newest generation if no other is given."""
        if generation is None:
            generation = self.generation
        self._epochs[instance_id] += 1
        epoch = self._epochs[instance_id]
        self.note("start", instance_id, role.value, epoch, self.version, generation)
        worker = SimWorker(self, instance_id, role, epoch, self.version, generation)
        self.workers[instance_id] = worker
        return worker

    async def restart(self, worker: SimWorker, after_s: float) -> None:
        """Start it again, unless somebody has."""
        self._restarting += 1
        await asyncio.sleep(after_s)
        self._restarting -= 1
        if self.workers[worker.instance_id] is worker and not self._leaving:
            self.start_worker(worker.instance_id, worker.role)

    def start_frontend(self, place: int, same_requests: bool = False) -> SimFrontend:
        """A frontend, or its next incarnation; with `same_requests` it names requests as that did."""
        old = self.frontends[place] if place < len(self.frontends) else None
        incarnation = old.incarnation + 1 if old is not None else 1
        first = 0 if same_requests or old is None else incarnation * 10_000
        self.note("start", f"f{place}", incarnation)
        frontend = SimFrontend(self, f"f{place}", incarnation, first)
        self.frontends[place : place + 1] = [frontend]
        return frontend

    @contextmanager
    def suspecting(
        self,
        workers: list[SimWorker],
        frontends: list[SimFrontend] | None = None,
        *,
        seen: Seen,
    ) -> Iterator[None]:
        """These workers do not answer these frontends, all if not given: they must be routed around."""
        names = [it.name for it in (self.frontends if frontends is None else frontends)]
        with self.watch.suspecting(workers, names, seen):
            yield

    def flying(self, instance_id: str | None = None, frontend: str | None = None) -> list[Asked]:
        """Requests that have not ended: of one worker, of one frontend, or all."""
        where = {
            live.lifecycle.request.request_id: live.lifecycle._instance_id
            for it in self.live_frontends()
            for live in it.router._live.values()
        }
        return [
            asked
            for asked in self.asked
            if not asked.ended
            and (frontend is None or asked.frontend == frontend)
            and (instance_id is None or where.get(asked.request.request_id) == instance_id)
        ]

    def fault(self, kind: str, target: str, asked: list[Asked]) -> None:
        """A fault begins, and meets these requests."""
        self.note("FAULT", kind, target)
        self.faults.append(FaultRecord(kind, target, asked))

    def _process(self, name: str) -> Process | None:
        worker = self.workers.get(name)
        return worker.process if worker is not None else None

    # --- the simulation -----------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Run it to its end, or to the first violation."""
        began = process_time()
        self.loop.set_exception_handler(self._unhandled)
        with self._watching_logs():
            try:
                self.loop.run_until_complete(self._until_violated())
            except StandsStill as error:
                self.violate("time passes", str(error))
                self.loop.forgive()
            self.over = self.network.over = True
            self._tear_down()
        return Outcome(
            seed=self.scenario.seed,
            violation=self.violation,
            digest=self._digest.hexdigest(),
            virtual_s=self.loop.time(),
            cpu_s=process_time() - began,
            callbacks=self.loop.callbacks,
            asked=self.asked,
            faults=self.faults,
            last_events=[_line(*event) for event in self._last],
        )

    async def _until_violated(self) -> None:
        story = self.loop.create_task(self._story())
        failed = self.loop.create_task(self._failed.wait())
        await asyncio.wait({story, failed}, return_when=asyncio.FIRST_COMPLETED)
        failed.cancel()
        if story.done():
            story.result()
        else:
            story.cancel()

    async def _story(self) -> None:
        scenario = self.scenario
        self.spawn(self.directory.expire_forever(self.loop))
        self.spawn(self.monitor.look_forever())
        for place in range(scenario.frontends):
            self.start_frontend(place)
        for number, (instance_id, role) in enumerate(scenario.roles.items()):
            # By twos, as roles take turns: both generations have both roles.
            self.start_worker(instance_id, role, number // 2 % 2 if scenario.mixed else None)
        await self._settle(checks.unready, "workers become ready")
        acts = [self.loop.create_task(self._act(fault)) for fault in scenario.faults]
        began = self.loop.time()
        for call in scenario.calls:
            await asyncio.sleep(max(0.0, began + call.at - self.loop.time()))
            self._call(call)
        await asyncio.gather(*acts)
        self.note("faults are over")
        await self._all_ended()
        self._check_ends()
        await self._settle(checks.unready, "all is well again")
        quiet_s = QUIET_SETTLE_S if self.scenario.quiet else SETTLE_S
        await self._settle(checks.unsettled, "nothing is left over", quiet_s)
        await self._probe()
        await self._settle(checks.unsettled, "nothing is left over")
        await self._leave()

    async def _act(self, fault: PlannedFault) -> None:
        await asyncio.sleep(fault.at)
        calm = fault.kind in LEAVES_LINKS
        with nullcontext() if calm else self.watch.disturbed():
            await FAULTS[fault.kind](self, random.Random(f"fault {fault.seed}"))

    def _call(self, call: Call) -> None:
        frontends = self.live_frontends()
        if frontends:
            self.asked += frontends[call.frontend % len(frontends)].ask(call)

    async def _all_ended(self) -> None:
        bound_s = self.scenario.deadlines.request_s + LATE_S
        for asked in self.asked:
            while not asked.ended:
                await asyncio.sleep(LOOK_S)
                if self.loop.time() > asked.at + bound_s + self.frozen_s[asked.frontend]:
                    self.violate("an end", f"{asked.request.request_id} has not ended in {bound_s:g} s")
                    return

    def _check_ends(self) -> None:
        bound_s = self.scenario.deadlines.request_s + LATE_S
        for asked in self.asked:
            name = asked.request.request_id
            served = asked.ended in NOT_SERVED or asked.ended == "ok"
            if asked.defect and asked.ended == "internal_error":
                served = True
            gentle = self.scenario.gentle and asked.frontend not in self.lying
            if not served and (gentle or asked.ended not in ERRORS_ALLOWED):
                self.violate("errors", f"{name} fails with {asked.ended}: {asked.error}")
            if asked.ended_at - asked.at > bound_s + self.frozen_s[asked.frontend]:
                self.violate("an end", f"{name} ends {asked.ended_at - asked.at:.3f} s after its start")

    async def _settle(
        self, complaints: Callable[[Lab], list[str]], what: str, most_s: float = SETTLE_S
    ) -> None:
        until = self.loop.time() + most_s
        while left := complaints(self):
            if self.loop.time() > until:
                self.violate(what, f"after {most_s:g} s: {'; '.join(left[:8])}")
                return
            await asyncio.sleep(LOOK_S)
        self.note("settled", what)

    async def _probe(self) -> None:
        """One more request for each frontend, which must succeed."""
        probes = []
        for frontend in self.live_frontends():
            sampling = Sampling(max_tokens=4, seed=7)
            probes += frontend.ask(Call(0.0, 0, [3, 1, 4, 1, 5, 9, 2, 6, 5], [sampling]))
        self.asked += probes
        await self._all_ended()
        for probe in probes:
            if probe.ended != "ok":
                self.violate("all is well again", f"a probe of {probe.frontend} ends with {probe.error}")

    async def _leave(self) -> None:
        """Everybody leaves in order."""
        self._leaving = True
        for worker in self.live_workers():
            worker.leave()
        until = self.loop.time() + self.scenario.drain_s + SETTLE_S
        while self.live_workers() and self.loop.time() < until:
            await asyncio.sleep(LOOK_S)
        for worker in self.live_workers():
            self.violate("all leave", f"{worker.instance_id} does not: {worker.process.running_tasks()}")
        for frontend in self.live_frontends():
            frontend.leave()
        await asyncio.sleep(self.scenario.client.close_timeout_s * 2)
        for frontend in self.live_frontends():
            tasks = frontend.process.running_tasks()
            if tasks:
                self.violate("no task leaked", f"{frontend.name} left, and its tasks did not: {tasks}")

    # --- around it ----------------------------------------------------------------------------------------

    def _unhandled(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.violate("no crash", f"{context.get('message')}: {context.get('exception')!r}")

    @contextmanager
    def _watching_logs(self) -> Iterator[None]:
        logger = logging.getLogger("penstock")
        handler = _LogWatch(self, tracing=self._trace is not None)
        level, propagate = logger.level, logger.propagate
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG if self._trace is not None else logging.ERROR)
        logger.propagate = False
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate

    def _tear_down(self) -> None:
        """End what is still there, the held processes' tasks too; nothing of it counts."""
        self.loop.set_exception_handler(lambda loop, context: None)
        for process in self.loop.processes:
            process.dead, process.frozen = False, 0
            self.loop.run_backlog(process)
        for _ in range(100):
            tasks = asyncio.all_tasks(self.loop)
            if not tasks:
                break
            for task in sorted(tasks, key=hash):
                task.cancel()
            self.loop.run_until_complete(asyncio.wait(tasks, timeout=5.0))
        self.loop.close()


class _LogWatch(logging.Handler):
    """Unexpected errors are only logged by those who survive them; here they are violations."""

    def __init__(self, lab: Lab, tracing: bool) -> None:
        super().__init__()
        self._lab = lab
        self._tracing = tracing

    def emit(self, record: logging.LogRecord) -> None:
        if self._tracing and self._lab._trace is not None and not self._lab.over:
            line = f"log {record.levelname.lower()} {record.name}: {record.getMessage()}"
            self._lab._trace(_line(self._lab.loop.time(), (line,)))
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and not isinstance(error, InjectedFault):
            self._lab.violate("no crash", f"{record.getMessage()}: {error!r}")


def _line(now: float, event: tuple[Any, ...]) -> str:
    return f"{now:10.6f} " + " ".join(map(str, event))
