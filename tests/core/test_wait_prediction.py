"""The pace that waits are predicted from, and refusals."""

from __future__ import annotations

from random import Random

import pytest

from penstock.core.fair_queue import FairQueue
from penstock.core.wait_prediction import MAX_RETRY_S, PRIOR_COUNTS, Pace, WaitPrediction


def serve(
    pace: Pace, now: float, calls: int, gap_s: float, *, at_once: int = 1, work: float = 1.0
) -> float:
    """Serve so many calls of this work, some at once after each gap. Returns the time."""
    for number in range(calls):
        if number % at_once == 0:
            now += gap_s
        pace.count(work, now)
    return now


def test_pace_of_few_entries_is_not_known() -> None:
    pace = Pace(5.0)
    pace.start(0.0)
    now = serve(pace, 0.0, PRIOR_COUNTS - 1, 0.1)
    assert (pace.known, pace.ms_per_unit) == (False, 0.0)
    serve(pace, now, 1, 0.1)
    assert pace.ms_per_unit == pytest.approx(100.0)


def test_guessed_pace_is_used_until_measurements_outweigh_it() -> None:
    pace = Pace(5.0)
    pace.guess(100.0, 1.0)
    assert pace.ms_per_unit == 100.0
    pace.start(0.0)
    serve(pace, 0.0, PRIOR_COUNTS, 0.2)
    assert pace.ms_per_unit == pytest.approx(150.0, rel=0.1)
    serve(pace, 1.6, 200, 0.2)
    assert pace.ms_per_unit == pytest.approx(200.0, rel=0.05)


@pytest.mark.parametrize("at_once", [1, 16, 256])
def test_pace_of_entries_served_many_at_once_is_their_mean(at_once: int) -> None:
    """Wherever between two steps of a worker one looks."""
    pace, now = Pace(5.0), 0.0
    pace.start(now)
    now = serve(pace, now, 2048, 0.002 * at_once, at_once=at_once)
    for _ in range(4):
        now += 0.002 * at_once
        for _ in range(at_once):
            pace.count(1.0, now)
            assert pace.ms_per_unit == pytest.approx(2.0, rel=0.3)


def test_changed_pace_is_followed_within_some_entries_and_seconds() -> None:
    pace = Pace(0.5)
    pace.start(0.0)
    now = serve(pace, 0.0, 500, 0.002)
    now = serve(pace, now, 500, 0.02)
    assert pace.ms_per_unit == pytest.approx(20.0, rel=0.05)
    serve(pace, now, 500, 0.002)
    assert pace.ms_per_unit == pytest.approx(2.0, rel=0.6)


def test_time_in_which_nothing_waits_does_not_count() -> None:
    pace = Pace(5.0)
    pace.start(0.0)
    now = serve(pace, 0.0, 20, 0.1)
    pace.stop()
    pace.count(1.0, now + 100.0)
    pace.start(now + 100.0)
    serve(pace, now + 100.0, 20, 0.1)
    assert pace.ms_per_unit == pytest.approx(100.0, rel=0.01)


def prediction() -> WaitPrediction:
    return WaitPrediction(FairQueue(), "a worker", 10_000.0, Random(1))


def test_newcomer_within_the_bound_is_not_refused() -> None:
    assert prediction().refuse(8000.0) is None


def test_refused_newcomers_may_come_back_at_different_times_when_the_wait_is_within_the_bound() -> None:
    it = prediction()
    refusals = [refusal for _ in range(50) if (refusal := it.refuse(28_000.0)) is not None]
    assert len(refusals) == 50
    assert {refusal.reason for refusal in refusals} == {"wait"}
    seconds = {refusal.retry_after_s for refusal in refusals}
    assert (min(seconds), max(seconds)) == (21.0, 25.0)
    assert len(seconds) == 5


def test_retry_after_a_very_long_wait_is_limited() -> None:
    refusal = prediction().refuse(1e9)
    assert refusal is not None
    assert MAX_RETRY_S <= refusal.retry_after_s <= 1.25 * MAX_RETRY_S
