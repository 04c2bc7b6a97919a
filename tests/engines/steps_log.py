"""Everything an engine said, and when, for tests on any clock."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from penstock.clock import MonotonicClock, VirtualClock
from penstock.ports import Engine, EngineStep
from penstock.shapes import Output
from tests import builders

attempt = partial(builders.attempt, prompt=100, max_tokens=10)


class StepsLog:
    """All steps of an engine, with the time of each on a clock."""

    def __init__(self, engine: Engine, clock: VirtualClock | MonotonicClock) -> None:
        self.engine = engine
        self.clock = clock
        self.steps: list[tuple[float, EngineStep]] = []

    async def read(self) -> None:
        async for step in self.engine.steps():
            self.steps.append((self.clock.now(), step))

    def outputs(self, attempt_id: str) -> list[tuple[float, Output]]:
        return [(at, o) for at, step in self.steps for o in step.outputs if o.attempt_id == attempt_id]

    def text(self, attempt_id: str) -> list[int]:
        return [token for _, output in self.outputs(attempt_id) for token in output.token_ids]


@asynccontextmanager
async def running(engine: Engine, clock: VirtualClock | MonotonicClock) -> AsyncIterator[StepsLog]:
    log = StepsLog(engine, clock)
    await engine.start()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(log.read())
        yield log
        await engine.stop(0)
