"""The rolling restart: replaces replicas one by one. The new replica is ready before the old one stops.

A frontend's successor accepts connections from the same port. Where no GPU is free for a second worker, the
old worker stops first and its place is reserved for the new one. The service's other workers serve
meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from penstock.errors import ConfigError
from penstock.launcher.fleet import Fleet
from penstock.launcher.places import Place
from penstock.launcher.replica import Replica, ReplicaState


class Fleets(Protocol):
    """What a rolling restart needs of the supervisor."""

    def start(self, fleet: Fleet, place: Place) -> Replica:
        """Start one more replica of this service at this place."""

    def place_beside(self, replica: Replica) -> Place | None:
        """A place for the successor of a replica that still runs; None when the machine has none."""

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until `holds` is true; it is called after each change of a replica."""

    def notice(self, text: str) -> None:
        """Show a line to the user."""


class RollingRestart:
    """At most one restart at a time. All calls are on one event loop.

    Args:
        ready_s: seconds that a new replica gets to become ready.
    """

    def __init__(self, fleets: Fleets, ready_s: float) -> None:
        self.left: list[str] = []  # names of the replicas that are still to be replaced
        self.replaced: dict[str, str] = {}  # the last restart's: name of a replica -> name of its successor
        self.error = ""  # why the last restart stopped early
        self._fleets = fleets
        self._ready_s = ready_s
        self._task: asyncio.Task[None] | None = None

    def begin(self, fleets: Sequence[Fleet], tasks: asyncio.TaskGroup) -> list[str]:
        """Begin to replace all replicas of `fleets`, in order; their names. Raises ConfigError during
        another restart."""
        if self.left:
            raise ConfigError(f"a restart is under way: {', '.join(self.left)}")
        old = [(fleet, replica) for fleet in fleets for replica in fleet.wanted]
        self.left = [replica.launch.name for _, replica in old]
        self.replaced = {}
        self.error = ""
        self._fleets.notice(f"rolling restart of {', '.join(self.left) or 'nothing'}")
        self._task = tasks.create_task(self._run(old), name="rolling restart")
        return list(self.left)

    def cancel(self) -> None:
        """Stop the restart, because the graph stops."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self, old: Sequence[tuple[Fleet, Replica]]) -> None:
        try:
            for fleet, replica in old:
                if not replica.leaving:  # `scale` may have stopped it meanwhile
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
        beside = self._fleets.place_beside(old)
        if beside is None:
            await self._replace_in_place(fleet, old)
            return
        new = fleet.on_trial = self._fleets.start(fleet, beside)
        try:
            await self._settle(new, lambda: old.leaving)
        finally:
            fleet.on_trial = None
        if old.leaving:  # `scale` took the place from both
            new.stop()
        elif new.state is not ReplicaState.READY:
            new.stop()  # the old one keeps running
            raise ConfigError(f"{new.launch.name} did not start: {new.last_line}")
        else:
            self.replaced[old.launch.name] = new.launch.name
            await self._leave(fleet, old)

    async def _replace_in_place(self, fleet: Fleet, old: Replica) -> None:
        fleet.reserved = old.place
        await self._leave(fleet, old)
        if fleet.reserved is None:
            return  # `scale` took the place
        place, fleet.reserved = fleet.reserved, None
        new = self._fleets.start(fleet, place)
        await self._settle(new, lambda: new.leaving)
        if new.state is ReplicaState.READY:
            self.replaced[old.launch.name] = new.launch.name
        elif not new.leaving:
            raise ConfigError(f"{new.launch.name} did not start: {new.last_line}")

    async def _settle(self, new: Replica, is_moot: Callable[[], bool]) -> None:
        """Wait until the new replica is ready or has failed, or `is_moot` says that it is no longer
        needed."""
        try:
            async with asyncio.timeout(self._ready_s):
                await self._fleets.until(lambda: new.state is not ReplicaState.STARTING or is_moot())
        except TimeoutError:
            new.last_line = f"not ready after {self._ready_s:g} s"

    async def _leave(self, fleet: Fleet, old: Replica) -> None:
        old.stop()
        await self._fleets.until(lambda: old not in fleet.replicas)
