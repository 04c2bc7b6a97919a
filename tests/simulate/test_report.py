"""Figures of several runs, taken together."""

from __future__ import annotations

import pytest

from penstock.bench.measurements import RequestOutcome, Slo
from penstock.simulate.report import Estimate, Results, SimulationReport, compare


def report(policy: str, seed: int, ttft_s: float, good: int) -> SimulationReport:
    """Of ten requests, `good` of which end within a second."""
    results = Results(Slo(ttft_ms=1000))
    for number in range(10):
        late_s = 0.0 if number < good else 5.0
        results.add(RequestOutcome(None, ttft_s + late_s, 0.01, 1.0, 100, 50, 11))
    return results.report(
        policy=policy, scale=1.0, seed=seed, virtual_s=10.0, cpu_s=1.0, computing_share=0.5
    )


def test_a_run_counts_failures_as_not_good() -> None:
    results = Results(Slo(ttft_ms=1000, itl_ms=20))
    results.add(RequestOutcome(None, 0.5, 0.01, 1.0, 100, 60, 11))
    results.add(RequestOutcome(None, 0.5, 0.05, 1.0, 100, None, 1))
    results.add(RequestOutcome(error="refused (wait)", prompt_tokens=100))
    its = results.report(policy="kv", scale=2.0, seed=3, virtual_s=10.0, cpu_s=1.0, computing_share=0.5)
    assert (its.requests, its.errors) == (3, {"refused (wait)": 1})
    assert its.good_share == pytest.approx(1 / 3)
    assert its.goodput_per_s == pytest.approx(0.1)
    assert its.cached_share == pytest.approx(0.3)
    assert its.output_tokens_per_s == pytest.approx(1.2)
    assert its.itl_ms.mean == pytest.approx(10.0), "one token has no time between tokens"


def test_estimates_have_students_interval() -> None:
    assert Estimate.of([5.0]) == Estimate(5.0, None)
    estimate = Estimate.of([1.0, 2.0, 3.0])
    assert estimate.mean == pytest.approx(2.0)
    assert estimate.half_width == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert estimate.times(100).format(1) == "200.0 ±248.4"
    assert Estimate(1234.5, None).format(0) == "1,234"


def test_differences_are_taken_seed_by_seed() -> None:
    """The seeds differ by much, the policies by the same in each."""
    reports = [report("kv", seed, 0.1 + 0.2 * seed, 10 - seed) for seed in range(3)]
    reports += [report("other", seed, 0.2 + 0.2 * seed, 9 - seed) for seed in range(3)]
    first, other = compare(reports)
    assert first.good_share_difference is None
    assert other.good_share_difference is not None
    assert other.good_share_difference.mean == pytest.approx(-0.1)
    assert other.good_share.half_width is not None
    assert other.good_share_difference.half_width == pytest.approx(0, abs=1e-9)
    assert other.good_share.half_width > 0.1
