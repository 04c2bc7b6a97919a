"""The processes of a simulation: workers and frontends, as `process.py` puts them together."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from penstock.core.catalog import serves
from penstock.core.deadlines import Deadlines
from penstock.core.events import Event
from penstock.core.suspects import MAX_DEATHS
from penstock.errors import PenstockError, RequestRejected
from penstock.metrics import Metrics
from penstock.router.live import Live
from penstock.router.router import Router
from penstock.shapes import Attempt, Card, Handoff, ModelView, Request, Role
from penstock.worker.worker import Worker, WorkerSettings
from simulator.directory import SimDiscovery
from simulator.engine import LabClock, LabEngine, LabTransfer
from simulator.loop import Process
from simulator.workload import Asked, Call

if TYPE_CHECKING:
    from simulator.lab import Lab


REFUSED_S = 1.5
"""A request that is refused although some worker had nothing to do for so long is refused wrongly."""

RESTART_S = 1.0
"""Until a supervisor starts a worker again that ended by itself."""


_LIMITS = Deadlines()
MOST_SENDS = 1 + _LIMITS.max_attempts + _LIMITS.max_moves + MAX_DEATHS
"""Attempts of a request without a token between them, bounces left out."""

PREPARE_S = 0.05
"""That a frontend takes to load a model's tokenizer."""


class SimWorker:
    """One incarnation of a worker, from its start to its exit."""

    def __init__(
        self, lab: Lab, instance_id: str, role: Role, epoch: int, version: int, generation: int
    ) -> None:
        """`version`: of its model; `generation`: of its settings (Scenario.sim_of)."""
        self.lab = lab
        self.instance_id = instance_id
        self.role = role
        self.epoch = epoch
        self.version = version
        self.generation = generation
        self.process = Process(lab.loop, instance_id)
        self.exited = ""  # how
        self.leaving = False
        self._leaves_at = 0.0
        self.clock = LabClock(self.process)
        self.engine: LabEngine
        self.worker: Worker
        self.transfer: LabTransfer | None = None
        self._stop: asyncio.Event
        self.main = self.process.spawn(self._run(), f"worker {instance_id}")
        self.main.add_done_callback(lambda task: self._exit("left"), context=lab.context)

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
        self.process.soon(self._told_to_leave)

    def _told_to_leave(self) -> None:
        self._leaves_at = self.process.clock.now() + self.lab.scenario.drain_s
        self._stop.set()

    def _stopping(self) -> None:
        left = self.engine.scheduler.statistics()
        if (left.attempts or left.held_handoffs) and not self.engine.dead:
            left_s = self._leaves_at - self.process.clock.now()
            if left_s > 0:
                what = f"{self.instance_id} stops with {left.attempts} attempts, "
                what += f"{left.held_handoffs} handoffs and {left_s:.3f} s to drain"
                self.lab.violate("drains", what)

    def kill(self) -> None:
        """As on SIGKILL."""
        self._exit("killed")

    async def _run(self) -> None:
        lab, scenario = self.lab, self.lab.scenario
        self._stop = asyncio.Event()
        if self.role is not Role.AGGREGATED:
            self.transfer = LabTransfer(
                scenario.transfer, lab.transfers, self.process, lab.offered, lab.pulled, self._wrong
            )
        sim = scenario.sim_of(self.version, self.generation)
        scheduler = replace(sim.scheduler, instance_id=self.instance_id, epoch=self.epoch)
        self.engine = LabEngine(
            replace(sim, scheduler=scheduler),
            self.clock,
            self.transfer,
            self._wrong,
            lambda what: lab.violate("no block leaked", f"{self.instance_id}: {what}"),
            self._stopping,
            lab.poisoned,
        )
        if self.transfer is not None:
            self.transfer.pool = lambda: self.engine.scheduler.pool
        self.worker = Worker(
            self.engine,
            SimDiscovery(lab.directory),
            WorkerSettings(
                self.instance_id,
                self.epoch,
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
            lab.note("worker failed", self.instance_id, error)

    def _wrong(self, what: str) -> None:
        self.lab.violate("wrong KV", f"{self.instance_id}: {what}")

    def _exit(self, how: str) -> None:
        if self.exited:
            return
        lab = self.lab
        if how == "left" and not self.main.cancelled():
            error = self.main.exception()
            if error is not None:
                lab.violate("no crash", f"{self.instance_id} ends with {error!r}")
            leaked = [name for name in self.process.running_tasks() if self.leaving]
            if leaked:
                lab.violate("no task leaked", f"{self.instance_id} left, and its tasks did not: {leaked}")
        self.exited = how
        self.process.dead = True
        lab.note("exit", self.instance_id, self.epoch, how)
        lab.network.killed(self.process)
        if self.transfer is not None:
            self.transfer.kill()
        if how == "left" and not self.leaving:
            lab.spawn(lab.restart(self, RESTART_S))


class _LabRouter(Router):
    """Tells `sending` of every attempt before it is sent."""

    def __init__(self, sending: Callable[[Live, str, Attempt], None], *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._sending = sending

    def _send(self, live: Live, instance_id: str, attempt: Attempt) -> Event | None:
        self._sending(live, instance_id, attempt)
        return super()._send(live, instance_id, attempt)


class SimFrontend:
    """One incarnation of a frontend, with the clients that it serves."""

    def __init__(self, lab: Lab, name: str, incarnation: int, first_request: int) -> None:
        self.lab = lab
        self.name = name
        self.process = Process(lab.loop, name)
        self.incarnation = incarnation
        self.exited = ""
        self._numbers = first_request
        self._asked: dict[str, Asked] = {}
        scenario = lab.scenario
        self.metrics = Metrics()
        self.sent_calls: set[str] = set()
        self.poison: dict[str, int] = {}  # by request id: steps in a row that it makes fail
        self.router = _LabRouter(
            self._sending,
            SimDiscovery(lab.directory),
            scenario.router,
            scenario.client,
            self.metrics.router,
            frontend_id=name,
            clock=self.process.clock,
            rng=random.Random(f"{scenario.seed} {name} {incarnation}"),
        )
        self.main = self.process.spawn(self.router.run(self._prepare), f"router {name}")
        self.main.add_done_callback(self._ended, context=lab.context)

    async def _prepare(self, model: ModelView) -> None:
        await self.process.clock.sleep(PREPARE_S)

    def _ended(self, main: asyncio.Task[None]) -> None:
        if not main.cancelled():
            self.lab.violate("no crash", f"{self.name} ends with {main.exception()!r}")

    def ask(self, call: Call) -> list[Asked]:
        """The requests of a client's call. They are submitted once the process runs."""
        asked = []
        call_id = f"call-{self.name}-{self._numbers}"
        for sampling in call.samplings:
            self._numbers += 1
            request = Request(
                f"{self.name}-{self._numbers}",
                self.lab.scenario.sim.model,
                "",  # known once it is submitted
                list(call.token_ids),
                sampling,
                cache_salt=call.cache_salt,
                priority=call.priority,
                tenant=f"tenant-{call.frontend % 3}",
                call_id=call_id,
            )
            lab = self.lab
            now = lab.loop.time
            it = Asked(request, self.name, now(), lab.note, lab.violate, now)
            it.refused = self._refused
            it.begin_again = self._begin_again
            asked.append(it)
            self._asked[request.request_id] = it
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
        self._asked[asked.request.request_id] = asked
        if before.request_id in self.poison:
            self.poison[asked.request.request_id] = self.poison[before.request_id]
        self.process.soon(self._submit, asked, None)

    def _version(self) -> int:
        """Of the model that this frontend takes requests for."""
        try:
            eos_token_ids = self.router.model(self.lab.scenario.sim.model).eos_token_ids
        except RequestRejected:  # it knows no worker yet, and clients do not wait for that
            return self.lab.version
        return int(eos_token_ids != list(self.lab.scenario.sim.eos_token_ids))

    def _revision(self, version: int) -> str:
        """Of this version of the model, as the workers that can decode have it."""
        known = self.lab.revisions
        for worker in self.lab.workers.values():
            if worker.role.decodes and worker.revision:
                known[worker.version] = worker.revision
        return known.get(version, "")

    def _submit(self, asked: Asked, hang_up_s: float | None) -> None:
        if asked.ended:
            return
        version = self._version()
        age_s = self.lab.loop.time() - asked.at
        asked.request = replace(asked.request, revision=self._revision(version), age_s=age_s)
        prompt, sampling = asked.request.token_ids, asked.request.sampling
        asked.wanted, asked.reason = self.lab.oracles[version].answer(len(prompt), sampling)
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
        asked.failures = lambda: ticket._live.lifecycle.strikes.lost
        if hang_up_s is not None:
            self.process.soon(self.lab.loop.call_later, hang_up_s, asked.hang_up)

    def _sending(self, live: Live, instance_id: str, attempt: Attempt) -> None:
        """Whether it may be sent: it was tokenized for this worker's model, its KV is or will be of use, it
        has not failed too often, and nobody who goes before it waits."""
        worker = self.lab.workers[instance_id]
        members = self.router._instances.membership.members
        member = members.get(instance_id)
        decode = members.get(live.lifecycle._decode_id if attempt.prefill_only else instance_id)
        if attempt.prefill_only or attempt.handoff is not None:
            made = attempt.handoff or (member.card if member is not None else None)
            self._check_kv(attempt.attempt_id, made, decode.card if decode is not None else None)
        revision = live.placed.request.revision
        same = member is not None and worker.epoch == member.registration.epoch
        if same and worker.revision and not serves(worker.revision, revision):
            what = f"{attempt.attempt_id} of {revision} goes to {instance_id} of {worker.revision}"
            self.lab.violate("revisions", what)
        asked = self._asked[attempt.request_id]
        asked.sends += 1
        if asked.sends - live.lifecycle._bounces > MOST_SENDS:
            self.lab.violate("retries end", f"{attempt.attempt_id} is the {asked.sends}th without a token")
        call_id, priority = live.placed.request.call_id, live.placed.request.priority
        if call_id in self.sent_calls or not attempt.attempt_id.endswith(".1"):
            return  # it goes with its call, or back to the head
        self.sent_calls.add(call_id)
        for other in [it for it in self.router._live.values() if it.queue is live.queue]:
            its = other.placed.request
            first = its.priority < priority and its.call_id not in self.sent_calls
            if (first or other.lifecycle._attempt_number > 0) and its.request_id in other.queue:
                self.lab.violate("the order of the queue", f"{attempt.attempt_id} passes {its.request_id}")

    def _check_kv(self, attempt_id: str, made: Card | Handoff | None, read: Card | None) -> None:
        """KV that one worker made, or is to make, is only for workers that read it."""
        if made is None or read is None:
            return
        theirs, ours = ((it.block_size, it.layout, it.transport) for it in (made, read))
        if theirs != ours:
            what = f"{attempt_id}: {read.instance_id} would refuse what {made.instance_id} computes"
            self.lab.violate("handoffs fit", what)

    def _refused(self, request_id: str, why: str) -> None:
        if "reason=full" in why:
            return  # it came at the same moment as too many others
        idle_s = self.lab.monitor.idle_s(self)
        if idle_s > REFUSED_S:
            what = (
                f"{self.name} refuses {request_id} while some worker had nothing to do for {idle_s:.3f} s"
            )
            self.lab.violate("no worker idles", what)

    def leave(self) -> None:
        """End in order."""
        self.process.soon(self.main.cancel)

    def kill(self) -> None:
        """As on SIGKILL: its clients hear of it from their own systems."""
        self.exited = "killed"
        self.process.dead = True
        self.lab.note("exit", self.name, self.incarnation, "killed")
        self.lab.network.killed(self.process)
        for asked in self.lab.asked:
            if asked.frontend == self.name and not asked.ended:
                asked.end("lost with its frontend")
