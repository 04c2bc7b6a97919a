from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

import msgspec
import pytest

from penstock.engines.assets import Assets
from penstock.engines.batch import BatchRow, Sampled
from penstock.engines.cycle import MAX_FAILED_STEPS, LoadedModel
from penstock.engines.settings import SchedulerSettings
from penstock.engines.stepping import SteppingEngine
from penstock.errors import ConfigError, RemoteError
from penstock.ports import EngineStep, Pulled
from penstock.shapes import FinishReason, Handoff, Incarnation, Output
from tests import builders
from tests.engines.rig import CARD, PROMPT, continued, next_token


class Runner:
    """The rig's model without its KV; `before` is called in the compute thread ahead of each batch."""

    def __init__(self, before: Callable[[list[BatchRow]], None] = lambda batch: None) -> None:
        self.before = before
        self.threads: set[str] = set()

    def run(self, batch: list[BatchRow]) -> list[Sampled | None]:
        self.threads.add(threading.current_thread().name)
        self.before(batch)
        return [Sampled(next_token(row.sequence.token_ids)) if row.sample else None for row in batch]


class Transfer:
    """A transfer in one process that answers at once, on a thread of its own."""

    name = "test"
    holders: dict[str, Transfer] = {}

    def __init__(self, address: str) -> None:
        self.address = address
        self.offers: set[str] = set()
        self.stopped = False
        self.refuse: str | None = None

    def start(self, pool: memoryview, on_pulled: Callable[[str], None]) -> None:
        assert pool.shape == (CARD.total_blocks, 1)
        self.on_pulled = on_pulled
        self.holders[self.address] = self

    def export(self, handoff_id: str, block_ids: Sequence[int]) -> tuple[str, bytes]:
        if self.refuse:
            raise RemoteError(self.refuse)
        self.offers.add(handoff_id)
        return self.address, b""

    def retract(self, handoff_id: str) -> bool:
        self.offers.discard(handoff_id)
        return True

    def pull(
        self,
        handoff: Handoff,
        source_indices: Sequence[int],
        block_ids: Sequence[int],
        timeout_s: float,
        on_done: Callable[[Pulled], None],
    ) -> None:
        if self.refuse:
            raise RemoteError(self.refuse)
        holder = self.holders[handoff.address]

        def read() -> None:
            holder.on_pulled(handoff.handoff_id)
            on_done(Pulled(len(block_ids), len(block_ids), 0.001))

        threading.Thread(target=read).start()

    def stop(self) -> None:
        self.stopped = True


def model(runner: Runner) -> LoadedModel:
    pool = memoryview(bytearray(CARD.total_blocks)).cast("B", (CARD.total_blocks, 1))
    return LoadedModel(msgspec.structs.replace(CARD, transport=""), Assets({}), runner, pool)


class Reader:
    """Reads an engine's steps until everything that is asked for has been seen."""

    def __init__(self, engine: SteppingEngine) -> None:
        self._steps = aiter(engine.steps())
        self.outputs: list[Output] = []
        self.steps: list[EngineStep] = []

    async def until(self, enough: Callable[[Reader], bool]) -> None:
        async with asyncio.timeout(60):
            while not enough(self):
                step = await anext(self._steps)
                self.steps.append(step)
                self.outputs += step.outputs

    async def end(self, *attempt_ids: str) -> None:
        await self.until(lambda reader: all(reader.last(i) for i in attempt_ids))

    def last(self, attempt_id: str) -> Output | None:
        ends = [o for o in self.outputs if o.attempt_id == attempt_id and o.finish_reason]
        assert len(ends) <= 1
        return ends[0] if ends else None

    def text(self, attempt_id: str) -> list[int]:
        return [t for o in self.outputs if o.attempt_id == attempt_id for t in o.token_ids]


attempt = partial(builders.attempt, prompt=PROMPT)


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., object]]:
    """Starts engines, and stops them after the test."""
    engines: list[SteppingEngine] = []

    async def start(
        runner: Runner | None = None, transfer: Transfer | None = None, **limits: float
    ) -> SteppingEngine:
        settings = SchedulerSettings(**limits)  # type: ignore[arg-type]
        engine = SteppingEngine(lambda: model(runner or Runner()), settings, transfer)
        engines.append(engine)
        await engine.start()
        return engine

    yield start
    for engine in engines:
        await engine.stop(0)
    assert not [thread for thread in threading.enumerate() if thread.name == "penstock-engine"]


Start = Callable[..., "asyncio.Future[SteppingEngine]"]


async def test_computes_in_a_thread_of_its_own(start: Start):
    runner = Runner()
    engine = await start(runner)
    engine.submit(attempt("a"))
    engine.submit(attempt("b", max_tokens=2))
    reader = Reader(engine)
    await reader.end("a", "b")
    assert reader.text("a") == continued(PROMPT, 5)
    assert reader.text("b") == continued(PROMPT, 2)
    assert runner.threads == {"penstock-engine"}
    assert reader.steps[-1].load.submitted == 2


async def test_tells_the_load_without_computing(start: Start):
    engine = await start()
    engine.submit(attempt("a", prompt=[]))
    reader = Reader(engine)
    await reader.end("a")
    assert reader.steps[-1].load.submitted == 1
    assert reader.steps[-1].load.steps == 1  # a turn, and a sign of life


async def test_cached_hashes_are_those_of_the_steps_handed_out(start: Start):
    engine = await start()
    engine.submit(attempt("a", max_tokens=20))
    reader = Reader(engine)
    cached: set[int] = set()
    while not reader.last("a"):
        seen = len(reader.steps)
        await reader.until(lambda reader, seen=seen: len(reader.steps) > seen)
        cached = (cached - set(reader.steps[-1].removed)) | set(reader.steps[-1].stored)
        assert set(engine.cached_hashes()) == cached
    assert len(cached) == 7


async def test_commands_are_taken_between_steps(start: Start):
    ahead = threading.Semaphore(0)
    engine = await start(Runner(lambda batch: ahead.acquire(timeout=60)))  # type: ignore[arg-type,return-value]
    engine.submit(attempt("a", max_tokens=50))
    engine.cancel("a")
    engine.cancel("nobody")
    engine.release("nobody", sent=False)
    engine.submit(attempt("b", max_tokens=1))
    ahead.release(100)
    reader = Reader(engine)
    await reader.end("a", "b")
    last = reader.last("a")
    assert last is not None
    assert last.finish_reason is FinishReason.CANCELLED


async def test_hands_over_and_pulls(start: Start, caplog: pytest.LogCaptureFixture):
    prefill = await start(transfer=Transfer("p"), holder=Incarnation("p0", 1))
    decode = await start(transfer=Transfer("d"))
    prefill.submit(attempt("p", prefill_only=True))
    first = Reader(prefill)
    await first.end("p")
    output = first.last("p")
    assert output is not None
    assert output.handoff is not None
    assert output.handoff.address == "p"
    assert output.handoff.transport == "test"
    decode.submit(attempt("d", generated=output.token_ids, handoff=output.handoff))
    second = Reader(decode)
    await second.end("d")
    assert second.text("d") == continued(PROMPT, 5)[1:]
    assert second.outputs[0].transferred_blocks == 3
    assert second.outputs[0].cached_tokens == 10
    await first.until(lambda reader: reader.steps[-1].load.held_handoffs == 0)


async def test_errors_of_the_transfer_are_answers(start: Start):
    transfer = Transfer("p")
    engine = await start(transfer=transfer)
    reader = Reader(engine)
    engine.submit(attempt("p", prefill_only=True))
    await reader.end("p")
    output = reader.last("p")
    assert output is not None
    transfer.refuse = "no memory"
    engine.submit(attempt("q", prefill_only=True))
    await reader.end("q")
    refused = reader.last("q")
    assert refused is not None
    assert refused.error == "KV transfer cannot export: no memory"
    other = await start(transfer=transfer)
    other.submit(attempt("d", generated=output.token_ids, handoff=output.handoff))
    second = Reader(other)
    await second.end("d")
    assert second.text("d") == continued(PROMPT, 5)[1:]


async def test_handoffs_expire_while_nothing_else_happens(start: Start):
    engine = await start(transfer=Transfer("p"), handoff_ttl_s=0.05)
    engine.submit(attempt("p", prefill_only=True))
    reader = Reader(engine)
    await reader.until(lambda reader: bool(reader.steps) and reader.steps[-1].load.held_handoffs == 1)
    await reader.until(lambda reader: reader.steps[-1].load.held_handoffs == 0)
    assert engine.scheduler.held.expired == 1


async def test_a_failed_step_ends_only_its_attempts(start: Start, caplog: pytest.LogCaptureFixture):
    def fail(batch: list[BatchRow]) -> None:
        if any(row.sequence.attempt_id == "bad" for row in batch):
            raise ValueError("bad row")

    engine = await start(Runner(fail))
    reader = Reader(engine)
    for _ in range(2 * MAX_FAILED_STEPS):  # never several in a row
        engine.submit(attempt("bad"))
        await reader.end("bad")
        bad = reader.last("bad")
        assert bad is not None
        assert bad.error == "step failed: ValueError('bad row')"
        engine.submit(attempt("good"))
        await reader.end("good")
        assert reader.text("good") == continued(PROMPT, 5)
        reader.outputs.clear()


async def test_an_engine_that_always_fails_is_given_up(start: Start, caplog: pytest.LogCaptureFixture):
    def fail(batch: list[BatchRow]) -> None:
        raise MemoryError

    engine = await start(Runner(fail), max_running=1)
    for i in range(MAX_FAILED_STEPS):
        engine.submit(attempt(f"{i}"))
    with pytest.raises(RemoteError, match="3 steps in a row failed"):
        await Reader(engine).until(lambda reader: False)


async def test_a_bug_ends_the_steps(start: Start, caplog: pytest.LogCaptureFixture):
    engine = await start(Runner(lambda batch: batch.clear()))
    engine.submit(attempt("a"))
    with pytest.raises(RemoteError, match="the engine failed"):
        await Reader(engine).until(lambda reader: False)


async def test_a_model_that_cannot_be_loaded():
    def load() -> LoadedModel:
        raise ConfigError("no such folder")

    engine = SteppingEngine(load, SchedulerSettings())
    with pytest.raises(ConfigError, match="no such folder"):
        await engine.start()
    await engine.stop(1)


async def test_stop_lets_running_attempts_finish(start: Start):
    transfer = Transfer("p")
    engine = await start(Runner(lambda batch: time.sleep(0.005)), transfer)
    engine.submit(attempt("a", max_tokens=10))
    await engine.stop(5)
    await engine.stop(5)
    reader = Reader(engine)
    with pytest.raises(StopAsyncIteration):
        await reader.until(lambda reader: False)
    assert reader.text("a") == continued(PROMPT, 10)
    assert transfer.stopped


async def test_stop_cancels_what_takes_longer_than_the_grace(start: Start):
    engine = await start(Runner(lambda batch: time.sleep(0.01)))
    engine.submit(attempt("a", max_tokens=5000))  # which takes 50 s
    began = time.monotonic()
    await engine.stop(0.05)
    assert time.monotonic() - began < 25
    reader = Reader(engine)
    with pytest.raises(StopAsyncIteration):
        await reader.until(lambda reader: False)
    last = reader.last("a")
    assert last is not None
    assert last.finish_reason is FinishReason.CANCELLED
