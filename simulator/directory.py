"""Discovery for the simulation: one directory, which can be away, lose what it has, and tell it late."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping

from penstock.shapes import Registration

RETRY_S = 0.25
"""Between tries while the directory is away."""

AWAY = "the directory is away"


class Directory:
    """What all processes see.

    Args:
        lease_s: how long an entry stays after the last word of whoever made it.
        delay_s: the longest time that a change takes to be seen.
        stale_share: how many views are older than the one before, or the same again.
    """

    def __init__(
        self,
        rng: random.Random,
        note: Callable[..., None],
        lease_s: float = 5.0,
        delay_s: float = 0.3,
        stale_share: float = 0.1,
    ) -> None:
        self.away = 0  # how many faults keep it away
        self.rng = rng
        self.lease_s = lease_s
        self.delay_s = delay_s
        self.stale_share = stale_share
        self._note = note
        self._entries: dict[str, tuple[Registration, float]] = {}  # with when the lease ends
        self._waiting: list[asyncio.Future[None]] = []
        self.version = 0

    def entries(self) -> dict[str, Registration]:
        """What is registered now."""
        return {instance_id: registration for instance_id, (registration, _) in self._entries.items()}

    def put(self, registration: Registration, now: float) -> None:
        """Register, or renew."""
        before = self._entries.get(registration.instance_id)
        self._entries[registration.instance_id] = (registration, now + self.lease_s)
        if before is None or before[0] != registration:
            self._changed()

    def remove(self, registration: Registration) -> None:
        """Deregister this incarnation; another one stays."""
        before = self._entries.get(registration.instance_id)
        if before is not None and before[0] == registration:
            del self._entries[registration.instance_id]
            self._changed()

    def lose_everything(self) -> None:
        """Its disk is gone."""
        self._entries.clear()
        self._changed()

    async def expire_forever(self, loop: asyncio.AbstractEventLoop) -> None:
        """Drop entries whose leases have ended. While it is away, nothing expires."""
        while True:
            await asyncio.sleep(RETRY_S)
            if self.away:
                for instance_id, (registration, _) in self._entries.items():
                    self._entries[instance_id] = (registration, loop.time() + self.lease_s)
                continue
            for registration, ends in list(self._entries.values()):
                if ends <= loop.time():
                    self.remove(registration)

    async def changed(self, version: int) -> None:
        """Return once there is something newer than this."""
        while version == self.version:
            future = asyncio.get_running_loop().create_future()
            self._waiting.append(future)
            await future

    def _changed(self) -> None:
        self.version += 1
        self._note("directory", " ".join(f"{one}/{it.epoch}" for one, it in self.entries().items()))
        for future in self._waiting:
            if not future.done():
                future.set_result(None)
        self._waiting.clear()


class SimDiscovery:
    """One process's view of it. Implements Discovery."""

    def __init__(self, directory: Directory) -> None:
        self.trouble = ""
        self._directory = directory

    async def register(self, registration: Registration) -> SimLease:
        lease = SimLease(self._directory, registration)
        lease.renewing = asyncio.create_task(lease.renew(), name=f"lease of {registration.instance_id}")
        return lease

    async def watch(self) -> AsyncIterator[Mapping[str, Registration]]:
        directory = self._directory
        older: dict[str, Registration] = {}
        while True:
            await self._reachable()
            version, view = directory.version, directory.entries()
            if directory.rng.random() < directory.stale_share:
                yield dict(older if directory.rng.random() < 0.5 else view)
                await asyncio.sleep(directory.delay_s * directory.rng.random())
            yield dict(view)
            older = view
            await directory.changed(version)
            await asyncio.sleep(directory.delay_s * directory.rng.random())

    async def close(self) -> None:
        """Nothing is open."""

    async def _reachable(self) -> None:
        while self._directory.away:
            self.trouble = AWAY
            await asyncio.sleep(RETRY_S)
        self.trouble = ""


class SimLease:
    """Implements Lease. While the directory is away, its entry ends by itself."""

    renewing: asyncio.Task[None]

    def __init__(self, directory: Directory, registration: Registration) -> None:
        self.registered = False
        self.trouble = "not yet"
        self._directory = directory
        self._registration = registration

    async def close(self) -> None:
        self.renewing.cancel()
        if not self._directory.away:
            self._directory.remove(self._registration)

    async def renew(self) -> None:
        """As long as the process lives."""
        while True:
            if self._directory.away:
                self.trouble = AWAY
                await asyncio.sleep(RETRY_S)
            else:
                self._directory.put(self._registration, asyncio.get_running_loop().time())
                self.registered, self.trouble = True, ""
                await asyncio.sleep(self._directory.lease_s / 3)
