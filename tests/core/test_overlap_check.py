"""Lasting differences are named, single ones are not, and trust returns."""

import pytest

from penstock.core.overlap_check import MIN_OBSERVATIONS, Cause, OverlapCheck, Verdict


def observe(
    check: OverlapCheck, times: int, predicted: int, actual: int, held_blocks: int | None = 100
) -> list[Verdict]:
    verdicts = [check.observe("w", predicted, actual, 16, held_blocks=held_blocks) for _ in range(times)]
    return [verdict for verdict in verdicts if verdict is not None]


@pytest.mark.parametrize(
    ("predicted", "actual", "held_blocks", "cause"),
    [
        (0, 640, 0, Cause.EVENTS_OFF),
        (0, 640, None, Cause.EVENTS_OFF),
        (0, 640, 50, Cause.HASH_MISMATCH),
        (160, 640, 50, Cause.UNDER_PREDICTION),
        (640, 0, 50, Cause.OVER_PREDICTION),
        (640, 160, 50, Cause.OVER_PREDICTION),
    ],
)
def test_a_lasting_difference_is_named_once(
    predicted: int, actual: int, held_blocks: int | None, cause: Cause
) -> None:
    check = OverlapCheck()
    assert not observe(check, MIN_OBSERVATIONS - 1, predicted, actual, held_blocks)
    assert check.trusted("w")
    verdicts = observe(check, 40, predicted, actual, held_blocks)
    assert [verdict.cause for verdict in verdicts] == [cause]
    assert check.cause("w") is cause
    assert str(cause) in str(verdicts[0])


def test_right_predictions_and_cold_prompts_say_nothing() -> None:
    check = OverlapCheck()
    assert not observe(check, 100, 0, 0)
    assert not observe(check, 100, 640, 640)
    assert not observe(check, 100, 640, 624), "the last block is computed again"
    assert not observe(check, 100, 15, 0), "less than a block"
    assert check.trusted("w")


def test_a_burst_of_evictions_is_not_lasting() -> None:
    check = OverlapCheck()
    observe(check, 100, 640, 640)
    assert not observe(check, 10, 640, 0)
    assert check.trusted("w")


def test_trust_returns_with_right_predictions_and_does_not_flap() -> None:
    check = OverlapCheck()
    observe(check, 50, 640, 0)
    assert not check.trusted("w")
    assert not observe(check, 5, 640, 640), "not yet"
    assert [verdict.cause for verdict in observe(check, 100, 640, 640)] == [None]
    assert check.trusted("w")
    for _ in range(20):  # one in three wrong stays on the trusted side
        assert not observe(check, 2, 640, 640)
        assert not observe(check, 1, 640, 0)


def test_instances_are_apart_and_forgotten_with_their_link() -> None:
    check = OverlapCheck()
    observe(check, 50, 640, 0)
    assert check.trusted("other")
    check.forget("w")
    assert check.trusted("w")
    assert not observe(check, MIN_OBSERVATIONS - 1, 640, 0)
