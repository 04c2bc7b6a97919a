"""Keys that wait to be worked on: each once, however often it was added, and never two at a time of the
same.

A key that is added while it is worked on is worked on again afterwards, so that no change is missed. One
whose work failed comes back after a pause, which doubles with each further failure.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Hashable
from typing import Generic, TypeVar

from penstock.clock import Clock

Key = TypeVar("Key", bound=Hashable)

RETRY_MIN_S = 0.25
RETRY_MAX_S = 60.0


class WorkQueue(Generic[Key]):
    """Keys and the times from which each may be taken."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._due: dict[Key, float] = {}
        self._taken: set[Key] = set()
        self._failures: dict[Key, int] = {}
        self._added = asyncio.Event()

    def __len__(self) -> int:
        """Keys that wait, be it for a time to come."""
        return len(self._due)

    def add(self, key: Key, after_s: float = 0.0) -> None:
        """Work on it, `after_s` from now at the latest."""
        at = self._clock.now() + after_s
        self._due[key] = min(at, self._due.get(key, at))
        self._added.set()

    async def take(self) -> Key:
        """The key that has been due for longest. The caller then says `done` or `failed`."""
        while True:
            free = [(at, key) for key, at in self._due.items() if key not in self._taken]
            at, key = min(free, key=lambda pair: pair[0]) if free else (None, None)
            if at is not None and key is not None and at <= self._clock.now():
                del self._due[key]
                self._taken.add(key)
                return key
            self._added.clear()
            await self._wait(at)

    def done(self, key: Key) -> None:
        """Nothing more is to be done, unless it was added meanwhile."""
        self._taken.discard(key)
        self._failures.pop(key, None)
        self._added.set()

    def failed(self, key: Key) -> float:
        """It is due again after a pause; how long, in seconds."""
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        pause_s = min(RETRY_MAX_S, RETRY_MIN_S * 2.0 ** min(failures - 1, 16)) * random.uniform(0.75, 1.0)
        self._taken.discard(key)
        self.add(key, pause_s)
        return pause_s

    async def _wait(self, until: float | None) -> None:
        """Until something was added, done, or that time has come."""
        waiting = asyncio.create_task(self._added.wait())
        sleeping = None
        if until is not None:
            sleeping = asyncio.ensure_future(self._clock.sleep(max(0.0, until - self._clock.now())))
        tasks = [waiting] if sleeping is None else [waiting, sleeping]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            # Not `await task`: what cancels this coroutine now could not be told from what just ended that.
            await asyncio.wait(tasks)
