"""The engine shell on a virtual clock: the same turns as in stepping.py, taken by a task of the event loop.

A step takes the time that a model of it says, on the clock that is given; nothing else takes any. So many
engines run in one process, deterministically, and as fast as Python goes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from penstock.clock import Clock
from penstock.engines.base import EngineBase
from penstock.engines.batch import BatchRow
from penstock.engines.cycle import Command, EngineCycle, LoadedModel, build_cycle
from penstock.engines.settings import SchedulerSettings
from penstock.ports import KvTransfer
from penstock.shapes import EngineCard


class VirtualEngine(EngineBase):
    """An Engine whose steps pass on `clock`. Everything happens on one event loop.

    Args:
        load: as SteppingEngine's; its runner takes no time of its own.
        duration_s: how long a batch takes, in seconds.
        transfer: one that calls back on this event loop.
    """

    def __init__(
        self,
        load: Callable[[], LoadedModel],
        duration_s: Callable[[list[BatchRow]], float],
        settings: SchedulerSettings,
        clock: Clock,
        transfer: KvTransfer | None = None,
    ) -> None:
        super().__init__()
        self._load = load
        self._duration_s = duration_s
        self._settings = settings
        self._clock = clock
        self._transfer = transfer
        self._inbox: list[Command] = []
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> EngineCard:
        """As Engine.start."""
        self._outbox.open()
        model = self._load()
        self._assets = model.assets
        self._cycle = build_cycle(model, self._settings, self._transfer, self._clock.now, self._post)
        self._task = asyncio.create_task(self._run(self._cycle), name="penstock-engine")
        return self._cycle.scheduler.card

    async def stop(self, grace_s: float) -> None:
        """As Engine.stop. Handoffs that wait for their readers count as running."""
        task, self._task = self._task, None
        if task is not None and self._cycle is not None:
            self._post(partial(self._cycle.stop, self._clock.now() + grace_s))
            await task
        transfer, self._transfer = self._transfer, None
        if transfer is not None:
            transfer.stop()

    def _post(self, command: Command) -> None:
        self._inbox.append(command)
        self._arrived.set()

    async def _run(self, cycle: EngineCycle) -> None:
        batch: list[BatchRow] = []
        with self._ending_steps():
            while not cycle.finished:
                if not batch:
                    await self._wait(cycle.wake_at)
                commands, self._inbox = self._inbox, []
                batch = cycle.begin(commands)
                if batch:
                    await self._clock.sleep(self._duration_s(batch))
                    cycle.compute(batch)
                self._hand_out(cycle)
            cycle.cancel_all()
            self._hand_out(cycle)

    async def _wait(self, wake_at: float | None) -> None:
        """Until there is a command, or it is `wake_at`."""
        if self._inbox:
            return
        self._arrived.clear()
        if wake_at is None:
            await self._arrived.wait()
            return
        timer = asyncio.create_task(self._ring(wake_at - self._clock.now()))
        try:
            await self._arrived.wait()
        finally:
            timer.cancel()
            await asyncio.wait([timer])

    async def _ring(self, seconds: float) -> None:
        await self._clock.sleep(seconds)
        self._arrived.set()
