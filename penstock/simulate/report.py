"""What came of simulated runs, of each and of several with other seeds together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean, stdev

import msgspec

from penstock.bench.measurements import Histogram, Percentiles, RequestOutcome, Slo

_STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""The 97.5 % quantiles of Student's t distribution with 1 to 10 degrees of freedom."""


class SimulationReport(msgspec.Struct):
    """What came of a run. Shares are of all requests, rates per second of virtual time."""

    policy: str
    scale: float  # by how much the load was multiplied
    seed: int
    virtual_s: float
    cpu_s: float
    requests: int
    errors: dict[str, int]
    good_share: float
    ttft_met_share: float  # that ended within the limit on the time to first token
    itl_met_share: float  # and on the mean time between tokens
    goodput_per_s: float
    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    ttft_ms: Percentiles
    itl_ms: Percentiles  # of each request's mean time between tokens
    e2e_ms: Percentiles
    cached_share: float  # of prompt tokens
    computing_share: float  # of all workers' time


class Results:
    """Collects the outcomes of one run's requests."""

    def __init__(self, slo: Slo) -> None:
        self._slo = slo
        self._ttft, self._itl, self._e2e = Histogram(), Histogram(), Histogram()
        self._errors: Counter[str] = Counter()
        self._good = self._ttft_met = self._itl_met = 0
        self._prompt_tokens = self._cached_tokens = self._output_tokens = 0

    def add(self, outcome: RequestOutcome) -> None:
        """A request has ended."""
        if outcome.error is not None:
            self._errors[outcome.error] += 1
            return
        slo = self._slo
        self._good += slo.met_by(outcome)
        self._ttft_met += Slo(ttft_ms=slo.ttft_ms).met_by(outcome)
        self._itl_met += Slo(itl_ms=slo.itl_ms).met_by(outcome)
        self._ttft.add(outcome.ttft_s)
        self._e2e.add(outcome.e2e_s)
        if outcome.output_tokens > 1:
            self._itl.add(outcome.itl_s)
        self._prompt_tokens += outcome.prompt_tokens
        self._output_tokens += outcome.output_tokens
        self._cached_tokens += outcome.cached_tokens or 0

    def report(
        self,
        *,
        policy: str,
        scale: float,
        seed: int,
        virtual_s: float,
        cpu_s: float,
        computing_share: float,
    ) -> SimulationReport:
        """Of everything so far."""
        requests = self._ttft.count + sum(self._errors.values())
        return SimulationReport(
            policy=policy,
            scale=scale,
            seed=seed,
            virtual_s=virtual_s,
            cpu_s=cpu_s,
            requests=requests,
            errors=dict(self._errors),
            good_share=self._good / max(1, requests),
            ttft_met_share=self._ttft_met / max(1, requests),
            itl_met_share=self._itl_met / max(1, requests),
            goodput_per_s=self._good / virtual_s,
            requests_per_s=self._ttft.count / virtual_s,
            prompt_tokens_per_s=self._prompt_tokens / virtual_s,
            output_tokens_per_s=self._output_tokens / virtual_s,
            ttft_ms=Percentiles.of(self._ttft),
            itl_ms=Percentiles.of(self._itl),
            e2e_ms=Percentiles.of(self._e2e),
            cached_share=self._cached_tokens / max(1, self._prompt_tokens),
            computing_share=computing_share,
        )


class Estimate(msgspec.Struct, frozen=True):
    """The mean of several runs' figures, and the half-width of its 95 % confidence interval; None for one
    run."""

    mean: float
    half_width: float | None

    @classmethod
    def of(cls, figures: Sequence[float]) -> Estimate:
        if len(figures) < 2:
            return cls(figures[0], None)
        student = _STUDENT[min(len(figures) - 1, len(_STUDENT)) - 1]
        return cls(fmean(figures), student * stdev(figures) / math.sqrt(len(figures)))

    def times(self, factor: float) -> Estimate:
        """In another unit."""
        width = self.half_width
        return Estimate(self.mean * factor, width * factor if width is not None else None)

    @property
    def least(self) -> float:
        """The lower end of the interval."""
        return self.mean - (self.half_width or 0.0)

    def format(self, digits: int) -> str:
        """For a table."""
        text = f"{self.mean:,.{digits}f}"
        return text if self.half_width is None else f"{text} ±{self.half_width:,.{digits}f}"


class Comparison(msgspec.Struct):
    """One policy at one scale: its runs with all seeds together. Differences are to the first policy, seed
    by seed, so that what the seeds have in common cancels out; None for the first policy itself."""

    policy: str
    scale: float
    good_share: Estimate
    ttft_ms: Estimate  # mean
    itl_ms: Estimate  # mean
    cached_share: Estimate
    good_share_difference: Estimate | None
    ttft_ms_difference: Estimate | None


def compare(reports: Sequence[SimulationReport]) -> list[Comparison]:
    """One for each scale and policy, in the order in which they come first."""
    groups: dict[tuple[float, str], list[SimulationReport]] = {}
    for report in reports:
        groups.setdefault((report.scale, report.policy), []).append(report)
    compared = []
    for (scale, policy), runs in groups.items():
        first = groups[scale, reports[0].policy]
        good = [run.good_share - other.good_share for run, other in zip(runs, first, strict=True)]
        ttft = [_ttft_ms(run) - _ttft_ms(other) for run, other in zip(runs, first, strict=True)]
        compared.append(
            Comparison(
                policy=policy,
                scale=scale,
                good_share=Estimate.of([run.good_share for run in runs]),
                ttft_ms=Estimate.of([_ttft_ms(run) for run in runs]),
                itl_ms=Estimate.of([run.itl_ms.mean or 0.0 for run in runs]),
                cached_share=Estimate.of([run.cached_share for run in runs]),
                good_share_difference=Estimate.of(good) if runs is not first else None,
                ttft_ms_difference=Estimate.of(ttft) if runs is not first else None,
            )
        )
    return compared


def _ttft_ms(report: SimulationReport) -> float:
    return report.ttft_ms.mean or 0.0
