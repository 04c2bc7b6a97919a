"""The engine shell: a scheduler, a runner and a transfer behind the Engine port, in a thread of their own.

    event loop                              compute thread
    submit, cancel, release  --inbox-->     turn after turn (cycle.py)
    steps()                  <--outbox--
    (transfer's threads)     --inbox-->

The thread sleeps while there is nothing to compute. It owns the scheduler: nobody else touches it once
`start` has returned. Beside the runner, which should release the GIL, its Python work per step is what the
event loop has to share with it.

The inbox has no limit of its own: a worker bounces what is too much before it
submits it, and the inbox is emptied at every turn.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread
from time import monotonic

from penstock.detached import detached
from penstock.engines.base import EngineBase
from penstock.engines.batch import BatchRow
from penstock.engines.cycle import Command, EngineCycle, LoadedModel, build_cycle
from penstock.engines.settings import SchedulerSettings
from penstock.errors import RemoteError
from penstock.ports import KvTransfer
from penstock.shapes import EngineCard

log = logging.getLogger("penstock.engine")

STOP_MARGIN_S = 10.0
"""How long, after the grace, a step that is being computed may still take before it is left behind."""


class SteppingEngine(EngineBase):
    """An Engine whose steps are computed by a Runner in one thread.

    Args:
        load: loads the model; called once, in a thread, by `start`. Raises ConfigError when it cannot.
        transfer: moves KV; started and stopped by this engine. None: prompts cannot be handed over.
    """

    def __init__(
        self,
        load: Callable[[], LoadedModel],
        settings: SchedulerSettings,
        transfer: KvTransfer | None = None,
    ) -> None:
        super().__init__()
        self._load = load
        self._settings = settings
        self._transfer = transfer
        self._inbox: SimpleQueue[Command] = SimpleQueue()
        self._thread: Thread | None = None

    async def start(self) -> EngineCard:
        """Load the model in a thread, and begin. Raises ConfigError when it cannot be loaded."""
        self._outbox.open()
        self._cycle = await detached(self._build)  # its files may be on a network folder
        self._thread = Thread(target=self._run, args=(self._cycle,), name="penstock-engine", daemon=True)
        await detached(self._thread.start)  # which waits until the thread runs
        return self._cycle.scheduler.card

    async def stop(self, grace_s: float) -> None:
        """As Engine.stop. Handoffs that wait for their readers count as running."""
        thread, self._thread = self._thread, None
        if thread is not None and self._cycle is not None:
            self._post(partial(self._cycle.stop, monotonic() + grace_s))
            await asyncio.to_thread(thread.join, grace_s + STOP_MARGIN_S)
            if thread.is_alive():
                log.error(
                    "a step did not end within %g s after the time to stop; its thread is abandoned",
                    STOP_MARGIN_S,
                )
                self._outbox.close(RemoteError("the engine did not stop in time"))
        transfer, self._transfer = self._transfer, None
        if transfer is not None:
            await asyncio.to_thread(transfer.stop)

    def _post(self, command: Command) -> None:
        self._inbox.put(command)

    def _build(self) -> EngineCycle:
        model = self._load()
        self._assets = model.assets
        return build_cycle(model, self._settings, self._transfer, monotonic, self._post)

    # --- the compute thread -----------------------------------------------------------------------

    def _run(self, cycle: EngineCycle) -> None:
        batch: list[BatchRow] = []
        with self._ending_steps():
            while not cycle.finished:
                batch = cycle.begin(self._commands(cycle.wake_at, wait=not batch))
                if batch:
                    cycle.compute(batch)
                self._hand_out(cycle)
            cycle.cancel_all()
            self._hand_out(cycle)

    def _commands(self, wake_at: float | None, *, wait: bool) -> list[Command]:
        """What has arrived; with `wait`, at least one command, or none when it is `wake_at`."""
        commands = []
        if wait and self._inbox.empty():
            timeout_s = None if wake_at is None else max(0.0, wake_at - monotonic())
            try:
                commands.append(self._inbox.get(timeout=timeout_s))
            except Empty:
                return []
        while not self._inbox.empty():  # this thread is the only one that takes
            commands.append(self._inbox.get_nowait())
        return commands
