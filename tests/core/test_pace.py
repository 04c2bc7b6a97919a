"""How fast a queue moves, however unevenly."""

from __future__ import annotations

import pytest

from penstock.core.pace import PRIOR_CALLS, Drain


def take(
    drain: Drain, now: float, calls: int, gap_s: float, *, at_once: int = 1, work: float = 1.0
) -> float:
    """So many calls of this work, some at once after each gap. Returns the time."""
    for number in range(calls):
        if number % at_once == 0:
            now += gap_s
        drain.took(work, now)
    return now


def test_nothing_is_known_before_some_calls_were_taken() -> None:
    drain = Drain(5.0)
    drain.begin(0.0)
    now = take(drain, 0.0, PRIOR_CALLS - 1, 0.1)
    assert (drain.known, drain.pace) == (False, 0.0)
    take(drain, now, 1, 0.1)
    assert drain.pace == pytest.approx(100.0)


def test_a_guess_weighs_as_much_as_some_calls() -> None:
    drain = Drain(5.0)
    drain.guess(100.0, 1.0)
    drain.guess(7.0, 1.0)  # there is one already
    assert drain.pace == 100.0
    drain.begin(0.0)
    take(drain, 0.0, PRIOR_CALLS, 0.2)
    assert drain.pace == pytest.approx(150.0, rel=0.1)
    take(drain, 1.6, 200, 0.2)
    assert drain.pace == pytest.approx(200.0, rel=0.05)


@pytest.mark.parametrize("at_once", [1, 16, 256])
def test_calls_that_go_many_at_once_have_the_pace_of_their_mean(at_once: int) -> None:
    """Wherever between two steps of a worker one looks."""
    drain, now = Drain(5.0), 0.0
    drain.begin(now)
    now = take(drain, now, 2048, 0.002 * at_once, at_once=at_once)
    for _ in range(4):
        now += 0.002 * at_once
        for _ in range(at_once):
            drain.took(1.0, now)
            assert drain.pace == pytest.approx(2.0, rel=0.3)


def test_a_change_is_followed_within_some_calls_and_seconds() -> None:
    drain = Drain(0.5)
    drain.begin(0.0)
    now = take(drain, 0.0, 500, 0.002)
    now = take(drain, now, 500, 0.02)
    assert drain.pace == pytest.approx(20.0, rel=0.05)
    take(drain, now, 500, 0.002)
    assert drain.pace == pytest.approx(2.0, rel=0.6)


def test_the_time_in_which_nothing_waits_does_not_count() -> None:
    drain = Drain(5.0)
    drain.begin(0.0)
    now = take(drain, 0.0, 20, 0.1)
    drain.end()
    drain.took(1.0, now + 100.0)
    drain.begin(now + 100.0)
    take(drain, now + 100.0, 20, 0.1)
    assert drain.pace == pytest.approx(100.0, rel=0.01)
