"""What is known of a candidate: the share of requests that met the limits, at each load that was simulated.

Loads are multiples of the given one, its scale. A candidate's margin is the scale up to which it meets the
objective. It lies between `low`, the highest scale below every failure, and `high`, the lowest failure;
`next_scale` halves what is between them, on a logarithmic scale. With several seeds the means of their
shares decide what is simulated next, and each seed has a margin of its own, so that their differences tell
how far it can be trusted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from penstock.plan.candidates import PlannedGraph
from penstock.simulate.report import SimulationReport

LEAST_SCALE = 1 / 8
"""What fails at so little load fails because of single requests, not because of the load."""

MOST_SCALE = 4.0
"""What bears so much more has too many GPUs."""


class Standing:
    """Of one candidate, as far as it was simulated."""

    def __init__(self, candidate: PlannedGraph, share: float) -> None:
        """`share`: of the requests that must meet the limits."""
        self.candidate = candidate
        self._share = share
        self.reports: dict[float, Sequence[SimulationReport]] = {}  # by scale, one for each seed

    def add(self, scale: float, reports: Sequence[SimulationReport]) -> None:
        """It was simulated at this scale."""
        self.reports[scale] = reports

    def good_share(self, scale: float) -> float:
        """Of the requests, at a scale that was simulated."""
        return fmean(report.good_share for report in self.reports[scale])

    def meets(self, scale: float) -> bool:
        """Whether the objective was met at this scale."""
        return self.good_share(scale) >= self._share

    @property
    def high(self) -> float | None:
        """The lowest scale at which the objective was not met; None: it always was."""
        return min((scale for scale in self.reports if not self.meets(scale)), default=None)

    @property
    def low(self) -> float | None:
        """The highest scale below that; None: the objective was never met."""
        high = self.high
        return max((scale for scale in self.reports if high is None or scale < high), default=None)

    def next_scale(self, tolerance: float) -> float | None:
        """Where to look next for the margin; None: it is known to within this factor, or out of reach."""
        high, low = self.high, self.low
        if not self.reports:
            return 1.0
        if high is None:
            assert low is not None
            return low * 2 if low < MOST_SCALE else None
        if low is None:
            return LEAST_SCALE if high > LEAST_SCALE else None
        return math.sqrt(low * high) if high / low > tolerance else None

    @property
    def margins(self) -> list[float]:
        """Of each seed, as far as the scales tell that were simulated; empty: it meets the objective
        nowhere."""
        if self.low is None:
            return []
        seeds = range(len(self.reports[self.low]))
        return [
            self._margin({scale: its[seed].good_share for scale, its in self.reports.items()})
            for seed in seeds
        ]

    def _margin(self, shares: Mapping[float, float]) -> float:
        """Where a straight line between the shares on both sides meets the objective; the nearest scale
        where there is only one side."""
        high = min((scale for scale, share in shares.items() if share < self._share), default=None)
        low = max((scale for scale in shares if high is None or scale < high), default=None)
        if low is None or high is None:
            return next(scale for scale in (low, high) if scale is not None)
        met, missed = shares[low], shares[high]
        return low * math.pow(high / low, (met - self._share) / (met - missed))

    @property
    def margin(self) -> float | None:
        """Their mean; None: it meets the objective nowhere."""
        return fmean(self.margins) if self.low is not None else None

    @property
    def rank(self) -> tuple[bool, float, float, float]:
        """Greater is better: what meets the objective by its margin, the rest by its good share; equals by
        the time to first token."""
        meets = self.meets(1.0)
        margin = (self.margin or 0.0) if meets else 0.0
        ttft_ms = fmean(report.ttft_ms.mean or 0.0 for report in self.reports[1.0])
        return meets, margin, self.good_share(1.0), -ttft_ms
