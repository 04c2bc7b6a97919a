"""Workers and frontends on virtual time: real routers, workers and links, sim engines, no machine's noise.

A minute of a loaded graph takes seconds, and the same always happens.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from penstock.core.admission import AdmissionSettings
from penstock.core.settings import RouterSettings
from penstock.engines.settings import SchedulerSettings
from penstock.engines.sim import SimSettings, sim_engine
from penstock.errors import PenstockError, RequestRejected
from penstock.link.settings import ClientSettings, ServerSettings
from penstock.metrics import Metrics
from penstock.router.router import Router
from penstock.shapes import Delta, Incarnation, Request, Role, Sampling
from penstock.transfer.sim import SimNetwork, SimTransfer, SimTransferSettings
from penstock.worker.worker import Worker, WorkerSettings
from simulator.directory import Directory, SimDiscovery
from simulator.loop import Process, VirtualLoop
from simulator.network import Network
from tests.false_events import FalseEvents

MODEL = "sim"
VOCABULARY = range(1000)  # token ids
READY_S = 1.0  # virtual; links are up long before


@dataclass(eq=False)
class Asked:
    """One request, and what became of it. Times in virtual seconds."""

    at: float
    tokens: int = 0
    first_at: float = 0.0
    last_at: float = 0.0
    refused: str = ""
    prompt: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    ended: bool = False

    @property
    def ttft_s(self) -> float:
        return self.first_at - self.at

    @property
    def itl_s(self) -> float:
        return (self.last_at - self.first_at) / max(1, self.tokens - 1)


class Frontend:
    """A router as a process of its own."""

    def __init__(self, cluster: VirtualCluster, name: str, router: RouterSettings) -> None:
        self._loop = cluster.loop
        self._numbers = itertools.count()
        self._name = name
        self._rng = random.Random(name)
        process = Process(cluster.loop, name)
        self.router = Router(
            SimDiscovery(cluster.directory),
            router,
            ClientSettings(),
            Metrics().router,
            frontend_id=name,
            clock=process.clock,
            rng=random.Random(name),
        )
        process.spawn(self.router.run(), name)

    def ask(
        self,
        prompt_tokens: int,
        max_tokens: int,
        tenant: str = "",
        stop_after: int = 0,
        after: Sequence[int] = (),
    ) -> Asked:
        """Submit a request with so many new tokens `after` others, whose output has `max_tokens` tokens, or
        `stop_after`."""
        prompt = [*after, *self._rng.choices(VOCABULARY, k=prompt_tokens)]
        asked = Asked(self._loop.time(), prompt=prompt)
        request = Request(
            f"{self._name}-{next(self._numbers)}",
            self.router.model(MODEL).key,
            prompt,
            Sampling(max_tokens=max_tokens),
            tenant=tenant,
        )

        def on_delta(delta: Delta) -> None:
            asked.tokens += len(delta.token_ids)
            asked.output += delta.token_ids
            asked.cached_tokens += delta.cached_tokens or 0
            asked.ended = delta.finish_reason is not None
            asked.first_at = asked.first_at or self._loop.time()
            asked.last_at = self._loop.time()
            if stop_after and asked.tokens >= stop_after:
                self._loop.call_soon(lambda: ticket.cancel(complete=True))

        def on_error(error: PenstockError) -> None:
            asked.refused = str(error)

        try:
            ticket = self.router.submit(request, on_delta, on_error)
        except RequestRejected as error:
            asked.refused = error.message
        return asked

    async def idle(self) -> None:
        """Wait until nothing of it is under way."""
        while self.router.dispatcher.records:
            await asyncio.sleep(0.05)

    async def open_loop(
        self, rate: float, seconds: float, draw: Callable[[random.Random], tuple[int, int]]
    ) -> list[Asked]:
        """Poisson arrivals; `draw` gives prompt and output tokens. Returns once all have ended."""
        asked, until = [], self._loop.time() + seconds
        while self._loop.time() < until:
            await asyncio.sleep(self._rng.expovariate(rate))
            asked.append(self.ask(*draw(self._rng)))
        await self.idle()
        return asked


class VirtualCluster:
    """Workers on virtual time: so many aggregated ones, or one for each of these roles."""

    def __init__(
        self,
        workers: int | Sequence[Role],
        *,
        max_running: int = 256,
        cost_model: str = "qwen3-8b/h200/tp1",
        total_blocks: int = 16_384,
        vocab_size: int = len(VOCABULARY),
    ) -> None:
        self.loop = VirtualLoop()
        self.loop.network = Network(self.loop, random.Random(1), lambda *event: None, (0.0001, 0.0005))
        self.directory = Directory(random.Random(1), lambda *event: None, lease_s=1e9)
        self._settings = SimSettings(
            model=MODEL,
            cost_model=cost_model,
            vocab_size=vocab_size,
            max_model_len=32_768,
            total_blocks=total_blocks,
            scheduler=SchedulerSettings(max_running=max_running),
        )
        self._stops: dict[str, asyncio.Event] = {}
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._epochs = itertools.count(1)
        self.engines: dict[str, FalseEvents] = {}
        self._transfers = SimNetwork()
        roles = [Role.AGGREGATED] * workers if isinstance(workers, int) else workers
        for number, role in enumerate(roles):
            self.start(f"w{number}", role=role)

    def start(
        self,
        name: str,
        block_size: int = 16,
        claimed_block_size: int | None = None,
        role: Role = Role.AGGREGATED,
    ) -> None:
        """Start a worker."""
        process = Process(self.loop, name)
        incarnation = Incarnation(name, next(self._epochs))
        scheduler = msgspec.structs.replace(self._settings.scheduler, holder=incarnation)
        settings = msgspec.structs.replace(self._settings, block_size=block_size, scheduler=scheduler)
        self._stops[name] = stop = asyncio.Event()

        async def serve() -> None:  # a transfer is made on the loop
            transfer = None
            if role is not Role.AGGREGATED:
                transfer = SimTransfer(SimTransferSettings(), self._transfers, name, process.clock)
            engine = FalseEvents(sim_engine(settings, transfer, process.clock), claimed_block_size)
            self.engines[name] = engine
            worker = Worker(
                engine,
                SimDiscovery(self.directory),
                WorkerSettings(incarnation, role),
                ServerSettings(host=name),
                process.clock,
            )
            await worker.run(stop)

        self._runs[name] = process.spawn(serve(), name)

    async def stop(self, name: str) -> None:
        """Let a worker leave in order."""
        self._stops[name].set()
        await self._runs[name]

    def frontend(self, name: str = "f0", slo_itl_ms: float = 25.0, **admission: Any) -> Frontend:
        settings = RouterSettings(slo_itl_ms=slo_itl_ms, admission=AdmissionSettings(**admission))
        return Frontend(self, name, settings)

    def run(self, story: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Wait until all is up, then do this."""

        async def whole() -> None:
            await asyncio.sleep(READY_S)
            await story()

        self.loop.run_until_complete(whole())
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.loop.close()


def refused(asked: Sequence[Asked]) -> list[Asked]:
    return [it for it in asked if it.refused]


def served(asked: Sequence[Asked]) -> list[Asked]:
    return [it for it in asked if not it.refused]
