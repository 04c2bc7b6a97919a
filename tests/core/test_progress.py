from __future__ import annotations

import pytest

from penstock.core.progress import PatientTime, Progress, ProgressLimits
from penstock.shapes import Load, Rates

LIMITS = ProgressLimits()
MEASURED = 100  # steps


def busy(steps: int, **fields: object) -> Load:
    return Load(steps=steps, running=1, **fields)  # type: ignore[arg-type]


def after(*reports: tuple[float, Load], batch_tokens: int = 0) -> Progress:
    progress = Progress(LIMITS, batch_tokens)
    for now, load in reports:
        progress.observe(load, now)
    return progress


def test_an_engine_that_stands_still_with_work_is_stuck_until_its_next_step() -> None:
    progress = after((0.0, Load(steps=MEASURED)), (10.0, busy(MEASURED)))
    assert progress.stuck_s(11.9) == 0.0
    progress.observe(busy(MEASURED), 12.0)  # heartbeats prove nothing
    assert progress.stuck_s(12.1) > 2.0
    assert "no step for 2.1 s: steps=100 running=1" in progress.describe(12.1)
    progress.observe(busy(MEASURED + 1), 13.0)
    assert progress.stuck_s(13.1) == 0.0


def test_one_without_work_may_stand_still_for_ever() -> None:
    progress = after((0.0, Load(steps=MEASURED)))
    assert progress.stuck_s(1e6) == 0.0


def test_work_that_was_taken_back_is_no_sign_of_life() -> None:
    progress = after((0.0, busy(MEASURED)))
    assert progress.stuck_s(3.0)
    progress.observe(Load(steps=MEASURED), 3.1)
    assert progress.stuck_s(3.2)
    progress.observe(Load(steps=MEASURED + 1), 3.3)
    assert not progress.stuck_s(9.0)


def test_waiting_is_work_too() -> None:
    progress = after((0.0, Load(steps=MEASURED, waiting=1)))
    assert progress.stuck_s(3.0)


def test_a_long_step_gets_its_time() -> None:
    slow = Rates(step_ms=10.0, prefill_token_ms=5.0, decode_request_ms=1.0)
    progress = after((0.0, busy(MEASURED, prefill_tokens=10_000, rates=slow)), batch_tokens=512)
    expected_s = 0.010 + 512 * 0.005 + 0.001
    assert not progress.stuck_s(LIMITS.stuck_s + LIMITS.step_factor * expected_s - 0.01)
    assert progress.stuck_s(LIMITS.stuck_s + LIMITS.step_factor * expected_s + 0.01)


def test_first_steps_get_more() -> None:
    progress = after((0.0, busy(0)))
    assert not progress.stuck_s(30.0)
    assert progress.stuck_s(33.0)


def test_unmeasured_rates_are_not_believed() -> None:
    progress = after((0.0, busy(LIMITS.first_steps, prefill_tokens=1000)))
    assert not progress.stuck_s(6.0)
    assert progress.stuck_s(8.0)


def test_time_in_which_this_process_was_held_up_does_not_count() -> None:
    time = PatientTime(100.0, interval_s=0.1)
    assert time.look(100.1) == pytest.approx(0.1)
    assert time.look(160.0) == pytest.approx(0.3)
    assert time.look(160.1) == pytest.approx(0.4)
