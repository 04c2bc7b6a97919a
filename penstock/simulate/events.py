"""What happens when: callbacks in the order of their times, on a clock that moves only with them."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

Callback = Callable[[], None]


class EventQueue:
    """Virtual time in seconds, from 0. Callbacks of one time run in the order in which they were added."""

    def __init__(self) -> None:
        self._now = 0.0
        self._order = count()
        self._events: list[tuple[float, int, Callback]] = []

    def now(self) -> float:
        """The time of the event that runs now."""
        return self._now

    def at(self, when_s: float, callback: Callback) -> None:
        """Call back at this time; now, if that has passed."""
        heapq.heappush(self._events, (max(when_s, self._now), next(self._order), callback))

    def after(self, seconds: float, callback: Callback) -> None:
        """Call back so many seconds from now."""
        self.at(self._now + seconds, callback)

    def run_next(self) -> bool:
        """Move to the next event and run it. False when there is none."""
        if not self._events:
            return False
        self._now, _, callback = heapq.heappop(self._events)
        callback()
        return True
