"""Lasting differences are named, single ones are not, and trust returns."""

import pytest

from penstock.core.overlap_check import (
    MIN_ANNOUNCEMENTS,
    MIN_OBSERVATIONS,
    Announcement,
    Cause,
    OverlapCheck,
    Verdict,
)


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
        (160, 640, 50, Cause.EVENTS_LOST),
        (640, 0, 50, Cause.UNSEEN_EVICTIONS),
        (640, 160, 50, Cause.UNSEEN_EVICTIONS),
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


def announce(check: OverlapCheck, times: int, *announcements: Announcement) -> list[Verdict]:
    verdicts = [check.announced("w", each) for _ in range(times) for each in announcements]
    return [verdict for verdict in verdicts if verdict is not None]


NAMED = Announcement(1.0)
SILENT = Announcement(0.0, silent=True)
OTHER_SIZE = Announcement(0.0, block_size=32)
OTHER_HASHES = Announcement(0.0)


@pytest.mark.parametrize(
    ("announcements", "cause"),
    [
        ([SILENT], Cause.EVENTS_OFF),
        ([OTHER_SIZE], Cause.BLOCK_SIZE),
        ([OTHER_HASHES], Cause.HASH_MISMATCH),
        ([NAMED, OTHER_HASHES, OTHER_HASHES], Cause.EVENTS_LOST),
        ([Announcement(0.25)], Cause.EVENTS_LOST),
    ],
)
def test_blocks_that_events_do_not_name_are_a_fault_with_a_name(
    announcements: list[Announcement], cause: Cause
) -> None:
    check = OverlapCheck()
    assert not announce(check, 1, *(announcements * MIN_ANNOUNCEMENTS)[: MIN_ANNOUNCEMENTS - 1])
    (verdict,) = announce(check, 10, *announcements)
    assert verdict.cause is check.cause("w") is cause
    assert verdict.block_size == (32 if cause is Cause.BLOCK_SIZE else None)


def test_a_fault_that_begins_after_a_long_time_is_named_as_one_of_the_beginning() -> None:
    for announcement, cause in ((SILENT, Cause.EVENTS_OFF), (OTHER_HASHES, Cause.HASH_MISMATCH)):
        check = OverlapCheck()
        assert not announce(check, 1000, NAMED)
        assert [it.cause for it in announce(check, 100, announcement)] == [cause]


def test_trust_returns_once_events_name_what_is_computed_whatever_hits_said_before() -> None:
    check = OverlapCheck()
    announce(check, 20, SILENT)
    observe(check, 100, 0, 640)
    observe(check, 100, 640, 0)
    assert check.cause("w") is Cause.EVENTS_OFF
    assert [it.cause for it in announce(check, 20, NAMED)] == [None]
    assert check.healthy("w")
    assert not observe(check, 100, 0, 640), "what was stored without events is found late"
    assert [it.cause for it in observe(check, 100, 640, 0)] == [Cause.UNSEEN_EVICTIONS]


def test_a_cause_that_was_named_from_hits_is_named_again_when_more_is_known() -> None:
    check = OverlapCheck()
    observe(check, MIN_OBSERVATIONS, 0, 640)
    assert check.cause("w") is Cause.HASH_MISMATCH
    assert [it.cause for it in announce(check, 20, OTHER_SIZE)] == [Cause.BLOCK_SIZE]


def test_a_worker_that_tells_nothing_of_its_cache_is_not_judged() -> None:
    check = OverlapCheck()
    check.tells_nothing("w")
    assert not observe(check, 100, 0, 640)
    assert not announce(check, 100, NAMED)
    assert check.cause("w") is Cause.NO_EVENTS
    check.forget("w")
    assert check.trusted("w")


def test_more_blocks_than_there_can_be_are_evictions_that_nobody_heard_of() -> None:
    check = OverlapCheck()
    verdict = check.overflowed("w")
    assert verdict is not None
    assert verdict.cause is check.cause("w") is Cause.UNSEEN_EVICTIONS
    assert check.overflowed("w") is None, "it was said"
    assert not observe(check, MIN_OBSERVATIONS - 1, 640, 640)
    assert [it.cause for it in observe(check, 1, 640, 640)] == [None]
