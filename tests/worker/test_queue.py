"""The queue that a worker reports, against what its engine then computes: sim and reference engines."""

from __future__ import annotations

import asyncio
import random
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from penstock.clock import VirtualClock
from penstock.discovery.file import FileDiscovery
from penstock.engines.batch import BatchRow, Sampled
from penstock.engines.reference.engine import ReferenceSettings, reference_engine
from penstock.engines.reference.kv import block_bytes
from penstock.engines.reference.model_config import read_config
from penstock.engines.settings import SchedulerSettings
from penstock.engines.sim import SimSettings, sim_engine
from penstock.link.settings import ServerSettings
from penstock.shapes import FinishReason, Handoff, Incarnation, Load, Role
from penstock.transfer.sim import SimNetwork, SimTransfer, SimTransferSettings
from penstock.transfer.tcp import TcpTransfer
from penstock.worker.worker import Worker, WorkerSettings
from tests import builders
from tests.waiting import WITHIN_S, until
from tests.worker.frontend import Frontend

TINY = Path(__file__).parents[2] / "models" / "tiny"
BLOCK_SIZE = 16
CHUNK = 64  # tokens of a step
STEP_S = 0.001  # less than any step of the sim engine takes


def text(seed: int, tokens: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(40, 120) for _ in range(tokens)]


class Computed:
    """Stands before an engine's runner, and keeps which rows were computed.

    Args:
        gate: a step ends only when it is given a permit; None: steps are not held.
    """

    def __init__(self, runner: Any, gate: threading.Semaphore | None) -> None:
        self.rows: list[tuple[str, int, int, bool]] = []  # attempt, start, count, whether it sampled
        self.begun = 0  # steps
        self.ended = 0
        self._runner = runner
        self._gate = gate

    def run(self, batch: list[BatchRow]) -> list[Sampled | None]:
        self.begun += 1
        if self._gate is not None:
            assert self._gate.acquire(timeout=WITHIN_S)
        samples = self._runner.run(batch)
        self.rows += [(row.sequence.attempt_id, row.start, row.count, row.sample) for row in batch]
        self.ended += 1
        return samples

    def until_answered(self, attempt_id: str, first_row: int) -> tuple[int, int]:
        """What was computed of an attempt from a row on until its next token: tokens, and those before
        each."""
        tokens = context_tokens = 0
        for name, start, count, sampled in self.rows[first_row:]:
            if name == attempt_id:
                tokens += count
                context_tokens += count * (2 * start + count) // 2
                if sampled:
                    break
        return (tokens, context_tokens) if tokens > 1 else (0, 0)  # a single one is a decoding attempt's


@dataclass
class Noted:
    load: Load
    attempts: list[str]
    first_row: int


class Lab(ABC):
    """A worker with a frontend, whose engine takes its steps as the test wants."""

    computed: Computed

    def __init__(self, folder: Path, role: Role, engine: Any, incarnation: Incarnation) -> None:
        self.engine = engine
        self.discovery = FileDiscovery(folder)
        self.worker = Worker(
            engine,
            self.discovery,
            WorkerSettings(incarnation, role, max_wait_ms=1e9, drain_s=0.0),
            ServerSettings(),
        )
        self.incarnation = incarnation
        self.noted: list[Noted] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        stop = asyncio.Event()
        task = asyncio.create_task(self.worker.run(stop))
        async for found in self.discovery.watch():
            if self.incarnation.instance_id in found:
                address = found[self.incarnation.instance_id].address
                break
        self.frontend = Frontend(address, "f")
        await until(lambda: self.frontend.cards)
        cycle = self.engine._cycle
        cycle._runner = self.computed = self.watched(cycle._runner)
        yield
        await self.finish()
        stop.set()
        await task
        await self.frontend.hang_up()

    @abstractmethod
    def watched(self, runner: Any) -> Computed:
        """The engine's runner, observed."""

    @abstractmethod
    async def in_step(self) -> None:
        """Until a step has begun, with what was submitted so far."""

    @abstractmethod
    async def step(self) -> None:
        """Let the step end that has begun."""

    @abstractmethod
    async def finish(self) -> None:
        """Compute all that there is."""

    async def submit(self, attempt_id: str, prompt: list[int], **fields: Any) -> None:
        attempt = builders.attempt(attempt_id, prompt, ignore_eos=True, temperature=0.0, **fields)
        self.frontend.client.generate(attempt)
        await until(lambda: attempt_id in self.worker.attempts)

    def note(self) -> Load:
        """Keep what is reported now, to be compared with what is computed from now on."""
        load = self.worker.load()
        self.noted.append(Noted(load, list(self.worker.attempts), len(self.computed.rows)))
        return load

    async def handed(self, attempt_id: str, prompt: list[int]) -> Handoff:
        """Prefill a prompt, and return the handoff."""
        await self.submit(attempt_id, prompt, prefill_only=True)
        await self.finish()

        def handoffs() -> list[Handoff | None]:
            outputs = [output for step in self.frontend.steps for output in step.outputs]
            return [output.handoff for output in outputs if output.finish_reason is FinishReason.PREFILLED]

        await until(handoffs)
        (handoff,) = handoffs()
        assert handoff is not None
        return handoff

    def check(self) -> None:
        """Each queue that was noted is what was computed afterwards: to the token, but for the single ones
        of attempts that compute no more than their last."""
        for noted in self.noted:
            works = [self.computed.until_answered(name, noted.first_row) for name in noted.attempts]
            tokens, context_tokens = (sum(work) for work in zip(*works, strict=True))
            assert 0 <= noted.load.prefill_tokens - tokens <= len(works)
            longest = max(start + count for _, start, count, _ in self.computed.rows)
            assert 0 <= noted.load.prefill_context_tokens - context_tokens <= len(works) * longest


class SimLab(Lab):
    clock = VirtualClock()

    def watched(self, runner: Any) -> Computed:
        return Computed(runner, None)

    async def in_step(self) -> None:
        await self.clock.advance(0.0)

    async def step(self) -> None:
        ended = self.computed.ended
        while self.computed.ended == ended:
            await self.clock.advance(STEP_S)
        await self.clock.advance(0.0)

    async def finish(self) -> None:
        while self.worker.attempts:
            await self.clock.advance(1.0)


class ReferenceLab(Lab):
    def watched(self, runner: Any) -> Computed:
        self.gate = threading.Semaphore(0)
        return Computed(runner, self.gate)

    async def in_step(self) -> None:
        await until(lambda: self.computed.begun > self.computed.ended)

    async def step(self) -> None:
        await self.in_step()
        steps = self.worker.load().steps
        self.gate.release()
        await until(lambda: self.worker.load().steps > steps)

    async def finish(self) -> None:
        while self.worker.attempts:
            if self.computed.begun > self.computed.ended:
                await self.step()
            else:
                await asyncio.sleep(0.001)


def sim_lab(folder: Path, network: SimNetwork, name: str, role: Role, blocks: int, running: int) -> Lab:
    incarnation = Incarnation(name, 1)
    settings = SimSettings(
        block_size=BLOCK_SIZE,
        total_blocks=blocks,
        vocab_size=200,
        scheduler=SchedulerSettings(running, CHUNK, holder=incarnation),
    )
    transfer = SimTransfer(SimTransferSettings(), network, name, SimLab.clock)
    return SimLab(folder, role, sim_engine(settings, transfer, SimLab.clock), incarnation)


def reference_lab(
    folder: Path, network: SimNetwork, name: str, role: Role, blocks: int, running: int
) -> Lab:
    incarnation = Incarnation(name, 1)
    settings = ReferenceSettings(
        str(TINY),
        block_size=BLOCK_SIZE,
        kv_cache_bytes=blocks * block_bytes(read_config(TINY), BLOCK_SIZE),
        scheduler=SchedulerSettings(running, CHUNK, holder=incarnation),
    )
    return ReferenceLab(folder, role, reference_engine(settings, TcpTransfer(incarnation)), incarnation)


Labs = Callable[..., Any]


@pytest.fixture(params=[sim_lab, reference_lab], ids=["sim", "reference"])
async def labs(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Labs]:
    """Starts workers; at the end each has computed what its notes foretold."""
    network = SimNetwork()
    started: list[Lab] = []
    async with AsyncExitStack() as stack:

        async def start(
            name: str = "w", role: Role = Role.AGGREGATED, blocks: int = 64, running: int = 8
        ) -> Lab:
            lab: Lab = request.param(tmp_path, network, name, role, blocks, running)
            started.append(lab)
            await stack.enter_async_context(lab.running())
            return lab

        yield start
        for lab in started:
            await lab.finish()
            lab.check()


async def test_a_cold_prompt_is_counted_from_its_arrival_on_and_less_with_each_chunk(labs: Labs) -> None:
    lab = await labs()
    await lab.submit("cold", text(1, 200))
    assert lab.note().prefill_tokens == 200
    await lab.step()
    assert lab.note().prefill_tokens == 200 - CHUNK
    await lab.step()
    assert lab.note().prefill_tokens == 200 - 2 * CHUNK


async def test_a_cached_prompt_that_arrives_during_a_step_counts_its_new_tokens(labs: Labs) -> None:
    lab = await labs()
    await lab.submit("warm", text(1, 400), max_tokens=1)
    await lab.finish()
    await lab.submit("long", text(2, 300))
    await lab.in_step()
    await lab.submit("next", text(1, 400) + text(3, 4))
    assert lab.note().prefill_tokens == 300 + 4
    await lab.step()
    assert lab.note().prefill_tokens == 300 - CHUNK + 4


async def test_a_pulled_handoff_counts_one_token_while_it_waits_and_while_it_is_pulled(labs: Labs) -> None:
    prefill = await labs("p", Role.PREFILL)
    decode = await labs("d", Role.DECODE, running=1)
    prompt = text(1, 150)
    handoff = await prefill.handed("a.1", prompt)
    await decode.submit("busy", text(2, 200), max_tokens=2)
    await decode.in_step()
    await decode.submit("a.2", prompt, generated=[50], handoff=handoff)
    assert decode.note().prefill_tokens == 200 + 1
    await decode.step()
    assert decode.note().prefill_tokens == 200 - CHUNK + 1


async def test_a_preempted_attempt_counts_what_it_lost(labs: Labs) -> None:
    lab = await labs(blocks=16)
    for name in ("a", "b"):
        await lab.submit(name, text(ord(name), 100), max_tokens=60)
        await lab.in_step()
    while not (lab.worker.load().running == 1 and lab.worker.load().waiting == 1):
        await lab.step()
    lab.note()
    assert 0 < lab.worker.load().prefill_tokens < 160


async def test_evicted_hits_of_a_waiting_prompt_count_again(labs: Labs) -> None:
    lab = await labs(blocks=24, running=1)
    await lab.submit("old", text(1, 100), max_tokens=1)
    await lab.finish()
    await lab.submit("busy", text(2, 260), max_tokens=60)
    await lab.in_step()
    await lab.submit("again", text(1, 100) + text(3, 5))
    assert lab.worker.load().prefill_tokens == 260 + 9
    outputs = 0
    while outputs < 55:
        await lab.step()
        outputs = lab.worker.load().context_tokens - 260
    assert lab.note().prefill_tokens > 9 + BLOCK_SIZE


async def test_what_others_compute_of_a_waiting_prompt_counts_no_more(labs: Labs) -> None:
    lab = await labs(running=1)
    await lab.submit("first", text(1, 200), max_tokens=2)
    await lab.in_step()
    await lab.submit("second", text(1, 200) + text(2, 10))
    await lab.step()
    await lab.step()
    await lab.step()
    await lab.step()
    assert lab.note().prefill_tokens == 210 - 192
