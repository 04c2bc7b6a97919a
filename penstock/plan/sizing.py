"""Finds the fewest workers of one form that meet the objective."""

from __future__ import annotations

import math

from penstock.plan.candidates import Form

MOST_GPUS = 512
"""No graph that is larger is tried."""


class Sizing:
    """A search between the most workers that do not suffice and the fewest that do.

    Args:
        start: workers that are tried first.
        growth: the factor by which their number grows or shrinks until both are known.
    """

    def __init__(self, form: Form, start: int, growth: float) -> None:
        self.form = form
        self._start = max(form.least, start)
        self._growth = growth
        self._too_few = form.least - 1
        self.fewest: int | None = None  # that are known to suffice

    def add(self, workers: int, suffice: bool) -> None:
        """Whether so many workers suffice."""
        if suffice:
            self.fewest = workers
        else:
            self._too_few = workers

    def next(self, most_gpus: int) -> int | None:
        """How many to try next; None: it is known, or it is more than so many GPUs."""
        if self.fewest is None:
            if self._too_few < self.form.least:
                return self._start if self._start * self.form.kind.gpus <= most_gpus else self.form.least
            workers = max(self._too_few + 1, math.ceil(self._too_few * self._growth))
            return workers if workers * self.form.kind.gpus <= most_gpus else None
        if self.fewest - self._too_few <= 1:
            return None
        if self._too_few < self.form.least:
            return max(self.form.least, min(self.fewest - 1, int(self.fewest / self._growth)))
        return (self.fewest + self._too_few) // 2
