"""Workers and a router in one process, over real links on loopback: sim engines, real KV pulls."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from penstock.core.settings import RouterSettings
from penstock.discovery.file import FileDiscovery, FileDiscoverySettings
from penstock.engines.cycle import MAX_FAILED_STEPS
from penstock.engines.settings import SchedulerSettings
from penstock.engines.sim import SimSettings, sim_engine
from penstock.errors import PenstockError
from penstock.link.settings import ClientSettings, ServerSettings
from penstock.metrics import Metrics
from penstock.router.instances import Prepare
from penstock.router.router import Router
from penstock.shapes import Delta, FinishReason, Incarnation, ModelKey, Request, Role, Sampling
from penstock.transfer.tcp import TcpTransfer
from penstock.worker.worker import Worker, WorkerSettings
from tests.waiting import until

MODEL = "sim"
WAIT_S = 20.0


class Gate:
    """Stands before an engine's runner; while it is closed, a step does not end."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.open = threading.Event()

    def run(self, batch: list[Any]) -> list[Any]:
        assert self.open.wait(WAIT_S)
        return self._runner.run(batch)


class Poisonable:
    """Stands before an engine's runner, and cannot compute a prompt that begins with this token.

    Args:
        dies: the engine is dead then; else only its step fails.
    """

    def __init__(self, cycle: Any, token: int, *, dies: bool) -> None:
        self._runner = cycle._runner
        self._cycle = cycle
        self._token = token
        self._dies = dies

    def run(self, batch: list[Any]) -> list[Any]:
        if any(row.sequence.token_ids[0] == self._token for row in batch):
            if self._dies:
                self._cycle.failed_steps = MAX_FAILED_STEPS
            raise ValueError("poison")
        return self._runner.run(batch)


class RunningWorker:
    """A worker as a task, which can be stopped kindly or cut off."""

    def __init__(
        self,
        cluster: Cluster,
        instance_id: str,
        role: Role,
        *,
        model: str = MODEL,
        aliases: tuple[str, ...] = (),
        **sim: Any,
    ) -> None:
        self.instance_id = instance_id
        incarnation = Incarnation(instance_id, next(cluster.epochs))
        transfer = None if role is Role.AGGREGATED else TcpTransfer(incarnation)
        settings = SimSettings(
            model=model,
            **{
                "cost_model": "zero",
                "vocab_size": 1000,
                "max_model_len": 4096,
                "total_blocks": 512,
                "scheduler": SchedulerSettings(holder=incarnation, **sim.pop("scheduler", {})),
                **sim,
            },
        )
        self.engine = sim_engine(settings, transfer)
        self.worker = Worker(
            self.engine,
            FileDiscovery(cluster.folder, cluster.discovery_settings),
            WorkerSettings(incarnation, role, aliases=aliases, **cluster.worker_settings),
            ServerSettings(),
        )
        self.stop = asyncio.Event()
        self.task = asyncio.create_task(self.worker.run(self.stop))

    def dies_of(self, token: int) -> None:
        """A prompt that begins with this token is its engine's last."""
        self.engine._cycle._runner = Poisonable(self.engine._cycle, token, dies=True)

    def fails_at(self, token: int) -> None:
        """A step with such a prompt fails."""
        self.engine._cycle._runner = Poisonable(self.engine._cycle, token, dies=False)

    @contextlib.contextmanager
    def stuck(self) -> Iterator[None]:
        """Meanwhile its engine stands still, from its next step on; the worker around it lives."""
        cycle = self.engine._cycle
        gate, runner = Gate(cycle._runner), cycle._runner
        cycle._runner = gate
        try:
            yield
        finally:
            gate.open.set()
            cycle._runner = runner

    async def leave(self) -> None:
        """As on SIGTERM."""
        self.stop.set()
        await asyncio.wait_for(self.task, WAIT_S)

    async def die(self) -> None:
        """As a killed process: no goodbye, no deregistration of what runs."""
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
        await self.engine.stop(0)


class Answer:
    """What a client sees of one request."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.error: PenstockError | None = None
        self.done = asyncio.Event()
        self.progress = asyncio.Event()

    def on_delta(self, delta: Delta) -> None:
        self.deltas.append(delta)
        self.progress.set()
        if delta.finish_reason is not None:
            assert not self.done.is_set()
            self.done.set()

    def on_error(self, error: PenstockError) -> None:
        assert not self.done.is_set()
        self.error = error
        self.done.set()

    async def tokens(self) -> list[int]:
        await asyncio.wait_for(self.done.wait(), WAIT_S)
        if self.error is not None:
            raise self.error
        return [token for delta in self.deltas for token in delta.token_ids]

    async def wait_tokens(self, count: int) -> None:
        async with asyncio.timeout(WAIT_S):
            while sum(len(delta.token_ids) for delta in self.deltas) < count:
                self.progress.clear()
                await self.progress.wait()

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.deltas[-1].finish_reason if self.deltas else None


class Cluster:
    """A router and its workers. Use `cluster(...)`."""

    def __init__(self, folder: Path, router: RouterSettings, **worker_settings: Any) -> None:
        self.folder = folder
        self.discovery_settings = FileDiscoverySettings(poll_s=0.05)
        self.worker_settings = worker_settings
        self.epochs = itertools.count(1)
        self.ids = itertools.count()
        self.metrics = Metrics()
        self.router = Router(
            FileDiscovery(folder, self.discovery_settings),
            router,
            ClientSettings(),
            self.metrics.router,
            frontend_id="test",
            rng=random.Random(0),
        )
        self.workers: dict[str, RunningWorker] = {}

    def start(self, instance_id: str, role: Role, **sim: Any) -> RunningWorker:
        worker = self.workers[instance_id] = RunningWorker(self, instance_id, role, **sim)
        return worker

    async def wait_ready(self, *instance_ids: str) -> None:
        def are_ready() -> bool:
            for worker in self.workers.values():
                if worker.task.done() and not worker.task.cancelled():  # it failed, and did not just die
                    worker.task.result()
            ready = {view.instance_id for view in self.router.instances() if view.state == "ready"}
            return ready == set(instance_ids)

        await until(are_ready, f"{instance_ids} are ready")

    def ask(
        self,
        tokens: list[int],
        max_tokens: int = 8,
        seed: int = 1,
        *,
        tenant: str = "",
        priority: int = 0,
        call_id: str = "",
        age_s: float = 0.0,
        revision: str = "",
        **sampling: Any,
    ) -> tuple[Answer, Any]:
        answer = Answer()
        request = Request(
            f"r{next(self.ids)}",
            ModelKey(MODEL, revision or self.revision),
            tokens,
            Sampling(max_tokens=max_tokens, seed=seed, **sampling),
            tenant=tenant,
            priority=priority,
            call_id=call_id,
            age_s=age_s,
        )
        return answer, self.router.submit(request, answer.on_delta, answer.on_error)

    @property
    def revision(self) -> str:
        """The revision of the model that new requests get."""
        return self.router.model(MODEL).revision

    @property
    def queued(self) -> int:
        """Requests that wait in the router."""
        return sum(view.requests for view in self.router.queues())

    async def complete(self, tokens: list[int], **options: Any) -> list[int]:
        return await self.ask(tokens, **options)[0].tokens()

    def busy(self) -> bool:
        loads = [view.load for view in self.router.instances()]
        return any(load.running or load.waiting or load.held_handoffs for load in loads)

    async def wait_idle(self) -> None:
        """Nothing runs, waits or is held anywhere."""
        await until(lambda: not self.busy(), lambda: self.router.instances())
        for view in self.router.instances():
            assert view.load.used_blocks == 0, view


QUICK = RouterSettings(tick_s=0.02)


@contextlib.asynccontextmanager
async def cluster(
    folder: Path,
    roles: dict[str, Role],
    router: RouterSettings = QUICK,
    sim: dict[str, Any] | None = None,
    prepare: Prepare | None = None,
    **worker_settings: Any,
) -> AsyncIterator[Cluster]:
    """A router with these workers, all ready; at the end all tasks must have ended well."""
    it = Cluster(folder, router, **worker_settings)
    routing = asyncio.create_task(it.router.run(prepare))
    try:
        for instance_id, role in roles.items():
            it.start(instance_id, role, **(sim or {}))
        await it.wait_ready(*roles)
        yield it
    finally:
        for worker in it.workers.values():
            if not worker.task.done():
                await worker.leave()
            elif not worker.task.cancelled():
                worker.task.exception()  # a test that lets it die knows; asyncio would complain of it later
            await worker.engine.stop(0)  # what a process's end does when its engine has died
        routing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await routing
