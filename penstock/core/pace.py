"""How fast a queue moves, as measured: work is in whatever unit its owner counts it, times in seconds."""

from __future__ import annotations

import math

FORGETTING = 0.02
"""By how much a call taken makes those before it count less, in a pace: the last 50 or so
count, or all of the last `half_s` where there were more. Workers that end many answers with one step take
as many at once: 50 calls may be a fraction of what one step set free."""

PRIOR_CALLS = 8
"""Calls taken before a pace counts; a guess weighs as much as that many."""

MAX_LINES = 256
"""Priorities whose recent work is remembered."""


class Drain:
    """How fast something empties, measured while there is something in it.

    Args:
        half_s: seconds in which what was measured comes to count half at the soonest; 0: no matter how
        soon.
    """

    __slots__ = ("_forgettable", "_guessed", "_half_ms", "_last", "_ms", "_work", "calls")

    def __init__(self, half_s: float) -> None:
        self.calls = 0
        self._half_ms = half_s * 1e3
        self._ms = 0.0
        self._work = 0.0
        self._guessed = False
        self._forgettable = 0.0  # by how much the time that has passed allows to forget
        self._last: float | None = None  # when the time not counted yet began; None: nothing waits

    def begin(self, now: float) -> None:
        """Something waits."""
        if self._last is None:
            self._last = now

    def end(self) -> None:
        """Nothing does any more."""
        self._last = None

    def guess(self, pace: float, work: float) -> None:
        """As if PRIOR_CALLS calls of so much work each had been taken at this pace."""
        if not self.known:
            self._ms += PRIOR_CALLS * pace * work
            self._work += PRIOR_CALLS * work
            self._guessed = True

    def took(self, work: float, now: float, workers: int = 1) -> None:
        """So much has gone."""
        if self._last is not None:
            elapsed_ms = (now - self._last) * 1e3
            self._count(work, elapsed_ms * workers, elapsed_ms)
            self._last = now

    def measured(self, work: float, ms: float) -> None:
        """So much took one worker so long."""
        self._count(work, ms, ms)

    def _count(self, work: float, ms: float, elapsed_ms: float) -> None:
        self.calls += 1
        allowed = math.inf
        if self._half_ms:
            allowed = self._forgettable + elapsed_ms * math.log(2) / self._half_ms
        forgotten = min(FORGETTING, allowed)
        self._forgettable = min(1.0, allowed - forgotten)
        kept = math.exp(-forgotten)
        self._ms = self._ms * kept + ms
        self._work = self._work * kept + work

    @property
    def known(self) -> bool:
        """Whether the pace was guessed, or measured often enough."""
        return self._guessed or self.calls >= PRIOR_CALLS

    @property
    def pace(self) -> float:
        """Milliseconds of one worker per unit of work; 0 as long as it is not known."""
        return self._ms / self._work if self.known and self._work else 0.0


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
