"""How fast a queue moves, as measured: work is in whatever unit its owner counts it, times in seconds."""

from __future__ import annotations

import math

FORGETTING = 0.98
"""Weight of a call taken relative to the next one, in a pace: the last 50 or so count."""

MAX_LINES = 256
"""Priorities whose recent work is remembered."""


class Drain:
    """How fast something empties, measured while there is something in it."""

    __slots__ = ("_last", "_ms", "_work", "calls")

    def __init__(self) -> None:
        self.calls = 0
        self._ms = 0.0
        self._work = 0.0
        self._last: float | None = None  # when the time not counted yet began; None: nothing waits

    def begin(self, now: float) -> None:
        """Something waits."""
        if self._last is None:
            self._last = now

    def end(self) -> None:
        """Nothing does any more."""
        self._last = None

    def guess(self, pace: float, work: float) -> None:
        """The first guess, as if `work` had been taken at this pace."""
        self._ms, self._work = pace * work, work

    def took(self, work: float, now: float, workers: int = 1) -> None:
        """So much has gone."""
        if self._last is not None:
            self.measured(work, (now - self._last) * 1e3 * workers)
            self._last = now

    def measured(self, work: float, ms: float) -> None:
        """So much took one worker so long."""
        self.calls += 1
        self._ms = self._ms * FORGETTING + ms
        self._work = self._work * FORGETTING + work

    @property
    def pace(self) -> float:
        """Milliseconds of one worker per unit of work; 0 as long as nothing is known."""
        return self._ms / self._work if self._work else 0.0


class Recent:
    """How much work of each priority went lately: sums that halve every `half_s`."""

    def __init__(self, half_s: float) -> None:
        self._half_s = half_s
        self._sums: dict[int, tuple[float, float]] = {}  # work, and when that was

    def took(self, priority: int, work: float, now: float) -> None:
        """So much went."""
        before, at = self._sums.pop(priority, (0.0, now))
        self._sums[priority] = (before * math.exp2((at - now) / self._half_s) + work, now)
        if len(self._sums) > MAX_LINES:
            del self._sums[next(iter(self._sums))]  # of which none went for the longest time

    def per_second_before(self, priority: int, now: float) -> float:
        """Work per second of all lower numbers."""
        recent = sum(
            work * math.exp2((at - now) / self._half_s)
            for number, (work, at) in self._sums.items()
            if number < priority
        )
        return recent * math.log(2) / self._half_s
