"""The sim engine with a memory that can be checked, and with what can go wrong in an engine.

A block's 64 bytes hold its tokens' ids instead of their KV. Before anything is computed on top of blocks,
they must hold the tokens that they stand for: found in the cache, pulled from elsewhere, or computed here.
"""

from __future__ import annotations

import asyncio
import math
from array import array
from collections.abc import Callable

from penstock.engines.active import ActiveAttempt
from penstock.engines.batch import BatchRow, Sampled
from penstock.engines.cost_models import cost_model
from penstock.engines.cycle import MAX_FAILED_STEPS, EngineCycle, LoadedModel
from penstock.engines.sim import POOL_BYTES_PER_BLOCK, SimRunner, SimSettings, load_sim
from penstock.engines.virtual import VirtualEngine
from penstock.ports import EngineStep, KvTransfer
from simulator.false_teller import FalseTeller
from simulator.loop import Process

TOKEN_BYTES = 4
BLOCK_TOKENS = POOL_BYTES_PER_BLOCK // TOKEN_BYTES
"""Most tokens per block."""

CHECK_EVERY = 8
"""Decode steps of an attempt between two looks at all its blocks; the first look is at its first step."""

LEAKS_EVERY = 8
"""Turns of an engine between two looks at all its blocks."""


class InjectedFault(Exception):
    """A step that was made to fail."""


class EngineClock:
    """An engine's clock: its process's, but while the engine is wedged no sleep ends."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._wedged = 0
        self._free = asyncio.Event()
        self._free.set()

    def now(self) -> float:
        return self._process.clock.now()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self._free.wait()

    @property
    def wedged(self) -> bool:
        """Whether no sleep ends."""
        return self._wedged > 0

    def wedge(self) -> None:
        self._wedged += 1
        self._free.clear()

    def unwedge(self) -> None:
        self._wedged -= 1
        if not self._wedged:
            self._free.set()


class CheckedEngine(VirtualEngine):
    """A sim engine on `clock`.

    Args:
        wrong: called for KV that is not what it should be.
        leaked: called when a block has more or fewer references than it has holders.
        stopping: called before the engine ends what it still has.
        poison: how many steps in a row an attempt makes fail.
    """

    def __init__(
        self,
        settings: SimSettings,
        clock: EngineClock,
        transfer: KvTransfer | None,
        wrong: Callable[[str], None],
        leaked: Callable[[str], None],
        stopping: Callable[[], None],
        poison: Callable[[str], int],
    ) -> None:
        costs = cost_model(settings.cost_model)
        self._leaked = leaked
        self._stopping = stopping
        self.poison = poison
        self._turns = 0
        self._said: set[int] = set()  # cached, going by the steps that were handed out
        self._digest = 0  # the exclusive or of these
        self._until: dict[int, float] = {0: math.inf}  # until when each such digest was true
        self.failing_steps = 0
        self._clear_next = False
        self.teller: FalseTeller | None = None  # says something else of the cache
        self._wrong = wrong
        self._block_size = settings.block_size
        super().__init__(
            lambda: self._watched(load_sim(settings, None)),
            lambda batch: costs.step_ms(batch) / 1e3 / settings.speedup,
            settings.scheduler,
            clock,
            transfer,
        )

    def evict(self) -> None:
        """Lose all blocks that are not in use, as under a storm of other prompts."""

        def storm(now: float) -> None:
            pool = self.scheduler.pool
            taken = pool.allocate(pool.available_blocks)
            assert taken is not None
            pool.release(taken)

        self._post(storm)

    def clear(self) -> None:
        """Lose all blocks that are not in use, and report it as engines do that drop a whole cache."""
        self.evict()
        self._clear_next = True

    async def stop(self, grace_s: float) -> None:
        """As Engine.stop."""
        self._stopping()
        await super().stop(grace_s)

    @property
    def dead(self) -> bool:
        """Whether so many steps failed that it makes no more."""
        return self._cycle is not None and self._cycle.broken

    def broken(self) -> None:
        """Its next step is the last that may fail."""
        assert self._cycle is not None, "it has not started"
        self._cycle.failed_steps = MAX_FAILED_STEPS - 1

    @property
    def in_step(self) -> bool:
        """Whether a batch is being computed."""
        return self._cycle is not None and self._cycle.scheduler.statistics().rows > 0

    def cached_until(self, digest: int) -> float | None:
        """Until when what is cached had this exclusive or; None: it never had."""
        return self._until.get(digest)

    def _hand_out(self, cycle: EngineCycle) -> None:
        step = cycle.report()
        if step is not None:
            self._push(step, cycle)
        self._turns += 1
        if self._turns % LEAKS_EVERY == 0:
            self._look_for_leaks(cycle)

    def _push(self, step: EngineStep, cycle: EngineCycle) -> None:
        if self._clear_next:
            self._clear_next = False
            step.cleared, step.removed = True, []
            step.stored = cycle.scheduler.pool.cached_hashes()
        if step.stored or step.removed or step.cleared:
            self._note_cached(step)
        if self.teller is not None:
            self.teller.falsify(step)
        self._outbox.push(step)

    def _note_cached(self, step: EngineStep) -> None:
        """Remember what a frontend may take this cache for from now on."""
        self._until[self._digest] = self._clock.now()
        before, said = self._digest, self._said
        if step.cleared:
            said.clear()
            before = 0
        for changed in (said.intersection(step.removed), set(step.stored).difference(said)):
            for key in changed:
                before ^= key
            said ^= changed
        self._digest = before
        self._until[before] = math.inf

    def _look_for_leaks(self, cycle: EngineCycle) -> None:
        """Every reference to a block is an attempt's, a pull's or a handoff's."""
        try:
            cycle.scheduler.check_references()
        except AssertionError as error:
            self._leaked(str(error))
        if set(cycle.scheduler.pool.cached_hashes()) != self._said:
            self._leaked("what is cached is not what was said to be")

    def _watched(self, model: LoadedModel) -> LoadedModel:
        assert isinstance(model.runner, SimRunner)
        model.runner = _CheckedRunner(self, model.runner, model.pool, self._block_size, self._wrong)
        return model


class _CheckedRunner:
    """Writes tokens where their KV would be, and looks at those before them."""

    def __init__(
        self,
        engine: CheckedEngine,
        inner: SimRunner,
        pool: memoryview,
        block_size: int,
        wrong: Callable[[str], None],
    ) -> None:
        assert block_size <= BLOCK_TOKENS, f"more than {BLOCK_TOKENS} tokens do not fit in a block"
        self._engine = engine
        self._inner = inner
        self._pool = pool.cast("B")
        self._block_size = block_size
        self._wrong = wrong
        self._next: dict[str, int] = {}  # where an attempt's next row begins, if nothing happens to it

    def run(self, batch: list[BatchRow]) -> list[Sampled | None]:
        if self._engine.failing_steps:
            self._engine.failing_steps -= 1
            raise InjectedFault("this step was made to fail")
        for row in batch:
            steps = self._engine.poison(row.sequence.attempt_id)
            if steps >= MAX_FAILED_STEPS:
                self._engine.broken()
            if steps:
                raise InjectedFault(f"{row.sequence.attempt_id} is poison")
        if len(self._next) > 4 * len(batch) + 1000:
            self._next.clear()
        for row in batch:
            sequence, start = row.sequence, row.start
            known = self._next.get(sequence.attempt_id) == start
            if start and (not known or start % CHECK_EVERY == 0):
                self._check(row)
            self._next[sequence.attempt_id] = start + row.count
            self._write(row)
            # Also of a prompt that was pulled, and of which nothing is computed here.
            if self._engine.teller is not None and start <= sequence.prompt_len <= start + row.count:
                assert isinstance(sequence, ActiveAttempt)
                prompt = sequence.token_ids[: sequence.prompt_len]
                self._engine.teller.computed(prompt, sequence.cache_salt)
        return self._inner.run(batch)

    def _write(self, row: BatchRow) -> None:
        size, tokens, block_ids = self._block_size, row.sequence.token_ids, row.sequence.block_ids
        at, end = row.start, row.start + row.count
        while at < end:
            upto = min(end, at - at % size + size)
            data = array("I", tokens[at:upto]).tobytes()
            place = block_ids[at // size] * POOL_BYTES_PER_BLOCK + at % size * TOKEN_BYTES
            self._pool[place : place + len(data)] = data
            at = upto

    def _check(self, row: BatchRow) -> None:
        size, sequence, pool = self._block_size, row.sequence, self._pool
        width = size * TOKEN_BYTES
        there = b"".join(
            pool[block * POOL_BYTES_PER_BLOCK : block * POOL_BYTES_PER_BLOCK + width]
            for block in sequence.block_ids[: -(-row.start // size)]
        )
        wanted = array("I", sequence.token_ids[: row.start]).tobytes()
        if there[: len(wanted)] != wanted:
            self._wrong(f"attempt {sequence.attempt_id} computes on wrong KV before token {row.start}")
