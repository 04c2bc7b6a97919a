"""One simulation, from its scenario to its verdict: the world, its faults and its checks, put together."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from time import process_time
from typing import Any

from penstock.core.deadlines import MISSING
from penstock.shapes import Sampling
from simulator import settled
from simulator.checked_engine import InjectedFault
from simulator.clients import NOT_SERVED, Asked, SimulatedCall
from simulator.faults import FAULTS
from simulator.injector import FaultRecord, Injector
from simulator.journal import Journal, Violation
from simulator.loop import StandsStill, VirtualLoop
from simulator.monitor import Monitor
from simulator.scenario import PlannedFault, Scenario
from simulator.sending import SendingChecks
from simulator.watch import Watch
from simulator.world import World

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
} | {f"{phase.value}_timeout" for phase in MISSING}
"""In scenarios that are not gentle."""


LEAVES_LINKS = {
    "wedge",
    "stale-handoff",
    "step-failure",
    "eviction-storm",
    "transfer-cut",
    "transfer-slow",
    "clock-jump",
    "discovery-away",
    "discovery-flaps",
    "hang-ups",
    "burst",
    "defect",
    "scale-up",
}
"""Faults because of which no link between a frontend and a worker ends."""


@dataclass(slots=True)
class SimulationOutcome:
    """What became of one seed."""

    seed: int
    violation: Violation | None
    digest: str  # of everything that happened, in order
    virtual_s: float
    cpu_s: float
    callbacks: int
    asked: list[Asked]
    faults: list[FaultRecord]
    last_events: list[str]


class Lab:
    """Runs one scenario.

    Args:
        trace: gets every event as a line, as it happens.
        minded: the invariants whose violations count; all if not given.
    """

    def __init__(
        self,
        scenario: Scenario,
        trace: Callable[[str], None] | None = None,
        minded: Container[str] | None = None,
    ) -> None:
        self.scenario = scenario
        self.loop = VirtualLoop(scenario.callback_s)
        self.journal = Journal(self.loop.time, trace, minded)
        self.world = World(scenario, self.loop, self.journal)
        self._monitor = Monitor(self.world)
        self._injector = Injector(self.world, Watch(self.world))
        self.world.frontend_checks = SendingChecks(self.world, self._monitor)

    def run(self) -> SimulationOutcome:
        """Run it to its end, or to the first violation."""
        began = process_time()
        self.loop.set_exception_handler(self._unhandled)
        with self._watching_logs():
            try:
                self.loop.run_until_complete(self._until_violated())
            except StandsStill as error:
                self.journal.violate("time passes", str(error))
                self.loop.forgive()
            self.journal.closed = self.world.network.over = True
            self._tear_down()
        return SimulationOutcome(
            seed=self.scenario.seed,
            violation=self.journal.violation,
            digest=self.journal.digest(),
            virtual_s=self.loop.time(),
            cpu_s=process_time() - began,
            callbacks=self.loop.callbacks,
            asked=self.world.asked,
            faults=self._injector.records,
            last_events=self.journal.last_events(),
        )

    async def _until_violated(self) -> None:
        story = self.loop.create_task(self.story())
        failed = self.loop.create_task(self.journal.violated.wait())
        await asyncio.wait({story, failed}, return_when=asyncio.FIRST_COMPLETED)
        failed.cancel()
        if story.done():
            story.result()
        else:
            story.cancel()

    # --- the story --------------------------------------------------------------------------------------

    async def story(self) -> None:
        """All that the scenario says, and what must be true after it."""
        scenario, world = self.scenario, self.world
        world.spawn(world.directory.expire_forever(self.loop))
        world.spawn(self._monitor.look_forever())
        for place in range(scenario.frontends):
            world.start_frontend(place)
        for number, (instance_id, role) in enumerate(scenario.roles.items()):
            # By twos, as roles take turns: both generations have both roles.
            world.start_worker(instance_id, role, number // 2 % 2 if scenario.mixed else None)
        await self.settle(settled.unready, "workers become ready")
        acts = [self.loop.create_task(self._act(fault)) for fault in scenario.faults]
        began = self.loop.time()
        for call in scenario.calls:
            await asyncio.sleep(max(0.0, began + call.at - self.loop.time()))
            self.call(call)
        await asyncio.gather(*acts)
        self.journal.note("faults are over")
        await self._all_ended()
        self._check_ends()
        await self.settle(settled.unready, "all is well again")
        quiet_s = QUIET_SETTLE_S if scenario.quiet else SETTLE_S
        await self.settle(settled.unsettled, "nothing is left over", quiet_s)
        await self._probe()
        await self.settle(settled.unsettled, "nothing is left over")
        await self._leave()

    async def _act(self, fault: PlannedFault) -> None:
        await asyncio.sleep(fault.at)
        calm = fault.kind in LEAVES_LINKS
        with nullcontext() if calm else self._injector.watch.disturbed():
            await FAULTS[fault.kind](self._injector, random.Random(f"fault {fault.seed}"))

    def call(self, call: SimulatedCall) -> None:
        """A client sends a call to one of the frontends that there are."""
        frontends = self.world.live_frontends()
        if frontends:
            self.world.ask(frontends[call.frontend % len(frontends)], call)

    async def settle(
        self, complaints: Callable[[World], list[str]], what: str, most_s: float = SETTLE_S
    ) -> None:
        """Wait until there are no complaints."""
        until = self.loop.time() + most_s
        while left := complaints(self.world):
            if self.loop.time() > until:
                self.journal.violate(what, f"after {most_s:g} s: {'; '.join(left[:8])}")
                return
            await asyncio.sleep(LOOK_S)
        self.journal.note("settled", what)

    async def _probe(self) -> None:
        """One more request for each frontend, which must succeed."""
        probes = []
        for frontend in self.world.live_frontends():
            sampling = Sampling(max_tokens=4, seed=7)
            call = SimulatedCall(0.0, 0, [3, 1, 4, 1, 5, 9, 2, 6, 5], [sampling])
            probes += self.world.ask(frontend, call)
        await self._all_ended()
        for probe in probes:
            if probe.ended != "ok":
                self.journal.violate(
                    "all is well again", f"a probe of {probe.frontend} ends with {probe.error}"
                )

    async def _leave(self) -> None:
        """Everybody leaves in order."""
        world, journal = self.world, self.journal
        world.close()
        for worker in world.live_workers():
            worker.leave()
        until = self.loop.time() + self.scenario.drain_s + SETTLE_S
        while world.live_workers() and self.loop.time() < until:
            await asyncio.sleep(LOOK_S)
        for worker in world.live_workers():
            what = f"{worker.instance_id} does not: {worker.process.running_tasks()}"
            journal.violate("all leave", what)
        for frontend in world.live_frontends():
            frontend.leave()
        await asyncio.sleep(self.scenario.client.close_timeout_s * 2)
        for frontend in world.live_frontends():
            tasks = frontend.process.running_tasks()
            if tasks:
                journal.violate("no task leaked", f"{frontend.name} left, and its tasks did not: {tasks}")

    # --- how requests end -------------------------------------------------------------------------------

    def _bound_s(self, asked: Asked) -> float:
        """The longest time that this request may take."""
        return self.scenario.deadlines.request_s + LATE_S + self._injector.frozen_s[asked.frontend]

    async def _all_ended(self) -> None:
        for asked in self.world.asked:
            while not asked.ended:
                await asyncio.sleep(LOOK_S)
                if self.loop.time() > asked.at + self._bound_s(asked):
                    what = f"{asked.request.request_id} has not ended in {self._bound_s(asked):g} s"
                    self.journal.violate("an end", what)
                    return

    def _check_ends(self) -> None:
        for asked in self.world.asked:
            name = asked.request.request_id
            served = asked.ended in NOT_SERVED or asked.ended == "ok"
            if asked.defect and asked.ended == "internal_error":
                served = True
            gentle = self.scenario.gentle and asked.frontend not in self._injector.lying
            if not served and (gentle or asked.ended not in ERRORS_ALLOWED):
                self.journal.violate("errors", f"{name} fails with {asked.ended}: {asked.error}")
            if asked.ended_at - asked.at > self._bound_s(asked):
                what = f"{name} ends {asked.ended_at - asked.at:.3f} s after its start"
                self.journal.violate("an end", what)

    # --- around it --------------------------------------------------------------------------------------

    def _unhandled(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.journal.violate("no crash", f"{context.get('message')}: {context.get('exception')!r}")

    @contextmanager
    def _watching_logs(self) -> Iterator[None]:
        logger = logging.getLogger("penstock")
        handler = _LogWatch(self.journal)
        level, propagate = logger.level, logger.propagate
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG if self.journal.tracing else logging.ERROR)
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

    def __init__(self, journal: Journal) -> None:
        super().__init__()
        self._journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        if self._journal.tracing:
            line = f"log {record.levelname.lower()} {record.name}: {record.getMessage()}"
            self._journal.trace(line)
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and not isinstance(error, InjectedFault):
            self._journal.violate("no crash", f"{record.getMessage()}: {error!r}")
