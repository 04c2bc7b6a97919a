"""Percentiles, goodput and what a report says."""

import math

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

from penstock.bench.measurements import Histogram, Measurements, RequestOutcome, Slo


@given(st.lists(st.floats(1e-5, 1e4), min_size=1, max_size=200), st.sampled_from([1, 50, 90, 99, 100]))
def test_percentiles_are_within_one_percent(values: list[float], percent: int) -> None:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    exact = sorted(values)[math.ceil(len(values) * percent / 100) - 1]
    assert histogram.percentile(percent) == pytest.approx(exact, rel=0.01)
    assert histogram.mean == pytest.approx(sum(values) / len(values))


def test_an_empty_histogram_and_zero() -> None:
    histogram = Histogram()
    assert math.isnan(histogram.mean)
    assert math.isnan(histogram.percentile(50))
    histogram.add(0.0)
    assert histogram.percentile(50) < 2e-6


def outcome(ttft_ms: float, itl_ms: float, cached_tokens: int | None = None) -> RequestOutcome:
    return RequestOutcome(
        ttft_s=ttft_ms / 1e3,
        itl_s=itl_ms / 1e3,
        e2e_s=1.0,
        prompt_tokens=100,
        cached_tokens=cached_tokens,
        output_tokens=10,
    )


def test_a_report_counts_and_divides() -> None:
    measurements = Measurements(Slo(ttft_ms=200, itl_ms=20))
    measurements.add(outcome(100, 10, cached_tokens=50))
    measurements.add(outcome(100, 30, cached_tokens=0))
    measurements.add(outcome(300, 10))
    measurements.add(RequestOutcome("http 429"), "busy")
    measurements.add(RequestOutcome("http 429"), "still busy")
    report = measurements.report(duration_s=2.0, client_cpu_share=0.1)
    assert (report.ok, report.failed, report.errors) == (3, 2, {"http 429": 2})
    assert report.examples == {"http 429": "busy"}
    assert report.output_tokens_per_s == 15.0
    assert report.cached_share == 0.25, "over those that say"
    assert report.good_share == 0.2, "failed requests are not good"
    assert report.goodput_per_s == 0.5
    assert report.ttft_ms.p50 == pytest.approx(100, rel=0.01)
    assert report.warnings == []


def test_nothing_measured_is_none_and_valid_json() -> None:
    report = Measurements().report(0.0, 0.0)
    assert report.ttft_ms.p99 is None
    assert (report.cached_share, report.good_share, report.goodput_per_s) == (None, None, None)
    assert b"NaN" not in msgspec.json.encode(report)


def test_a_busy_client_is_said_to_be_one() -> None:
    measurements = Measurements()
    measurements.lag.add(0.1)
    warnings = measurements.report(1.0, 0.95).warnings
    assert len(warnings) == 2
    assert "95%" in warnings[0]
    assert "late" in warnings[1]
