"""A rolling restart: replicas are replaced one by one, each by one that is ready before the old one leaves.

Where no second one can run beside it (its port is known to clients, or there is no GPU for it), the old
one leaves first; the others of its service serve meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from penstock.errors import ConfigError
from penstock.launcher.fleet import Fleet
from penstock.launcher.replica import Replica, ReplicaState


class Fleets(Protocol):
    """What a restart needs of the supervisor."""

    def grow(self, fleet: Fleet, count: int) -> None:
        """Start more replicas of it. Raises ConfigError."""

    def can_grow(self, fleet: Fleet) -> bool:
        """Whether one more may run beside those there are."""

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait for a change of some replica that makes this true."""

    def notice(self, text: str) -> None:
        """Tell people."""


class RollingRestart:
    """One at a time. Everything on one event loop.

    Args:
        ready_s: seconds that a new replica gets to become ready.
    """

    def __init__(self, fleets: Fleets, ready_s: float) -> None:
        self.left: list[str] = []  # names of the replicas that are still to be replaced
        self.error = ""  # why the last restart ended before its end
        self._fleets = fleets
        self._ready_s = ready_s
        self._task: asyncio.Task[None] | None = None

    def begin(self, fleets: Sequence[Fleet], tasks: asyncio.TaskGroup) -> list[str]:
        """Replace all replicas of these, in order; their names. Raises ConfigError during another one."""
        if self.left:
            raise ConfigError(f"a restart is under way: {', '.join(self.left)}")
        old = [(fleet, replica) for fleet in fleets for replica in fleet.wanted]
        self.left = [replica.launch.name for _, replica in old]
        self.error = ""
        self._fleets.notice(f"rolling restart of {', '.join(self.left) or 'nothing'}")
        self._task = tasks.create_task(self._run(old), name="rolling restart")
        return list(self.left)

    def cancel(self) -> None:
        """The graph stops."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self, old: Sequence[tuple[Fleet, Replica]]) -> None:
        try:
            for fleet, replica in old:
                if not replica.leaving:  # by `scale`, meanwhile
                    await self._replace(fleet, replica)
                self.left.pop(0)
            self._fleets.notice("rolling restart done")
        except ConfigError as error:
            self.error = str(error)
            self._fleets.notice(f"rolling restart ended: {error}")
        except asyncio.CancelledError:
            self.error = "the graph stops"
            raise
        finally:
            self.left.clear()

    async def _replace(self, fleet: Fleet, old: Replica) -> None:
        if self._fleets.can_grow(fleet):
            new = await self._start(fleet)
            if new.state is not ReplicaState.READY:
                new.stop()  # the old one stays
                raise ConfigError(f"{new.launch.name} did not start: {new.last_line}")
            await self._leave(fleet, old)
        else:
            await self._leave(fleet, old)
            new = await self._start(fleet)
            if new.state is not ReplicaState.READY:
                raise ConfigError(f"{new.launch.name} did not start: {new.last_line}")

    async def _start(self, fleet: Fleet) -> Replica:
        """A new one, ready or known not to be."""
        self._fleets.grow(fleet, 1)
        new = fleet.replicas[-1]
        try:
            async with asyncio.timeout(self._ready_s):
                await self._fleets.until(lambda: new.state is not ReplicaState.STARTING)
        except TimeoutError:
            new.last_line = f"not ready after {self._ready_s:g} s"
        return new

    async def _leave(self, fleet: Fleet, old: Replica) -> None:
        old.stop()
        await self._fleets.until(lambda: old not in fleet.replicas)
