"""A queue of keys. A key that is added several times is queued once, and is never worked on twice at a
time.

A key that is added while it is worked on is worked on again afterwards, so that no change is missed. A key
whose work failed is queued again after a pause, which doubles with each further failure.
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
    """Keys, each with the time from which it may be taken."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._due: dict[Key, float] = {}
        self._taken: set[Key] = set()
        self._failures: dict[Key, int] = {}
        self._added = asyncio.Event()

    def __len__(self) -> int:
        """The number of queued keys, due or not."""
        return len(self._due)

    def add(self, key: Key, after_s: float = 0.0) -> None:
        """Queue a key. It is due after `after_s` seconds, or earlier if it was queued before."""
        at = self._clock.now() + after_s
        self._due[key] = min(at, self._due.get(key, at))
        self._added.set()

    async def take(self) -> Key:
        """Wait for a key that is due, and take the one that has been due for longest. The caller must then
        call `done` or `failed`."""
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
        """End the work on a key. If it was added meanwhile, it stays queued."""
        self._taken.discard(key)
        self._failures.pop(key, None)
        self._added.set()

    def failed(self, key: Key) -> float:
        """End the work on a key, and queue it again after a pause. Returns the pause in seconds."""
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        pause_s = min(RETRY_MAX_S, RETRY_MIN_S * 2.0 ** min(failures - 1, 16)) * random.uniform(0.75, 1.0)
        self._taken.discard(key)
        self.add(key, pause_s)
        return pause_s

    async def _wait(self, until: float | None) -> None:
        """Wait until a key was added or done, or until the time `until`."""
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
            # Not `await task`: it would raise CancelledError, whether this coroutine or the task was
            # cancelled.
            await asyncio.wait(tasks)
