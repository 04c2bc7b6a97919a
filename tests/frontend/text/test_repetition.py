"""Where an answer that repeats itself ends."""

import random

import pytest

from penstock.frontend.text.repetition import RepetitionDetection, RepetitionDetector


def by_definition(token_ids, wanted):
    """How many tokens it takes until the last ones are a pattern as often as wanted."""
    for end in range(1, len(token_ids) + 1):
        for size in range(max(1, wanted.min_pattern_size), wanted.max_pattern_size + 1):
            tail = token_ids[max(0, end - size * wanted.min_count) : end]
            if tail == tail[:size] * wanted.min_count:
                return end
    return None


@pytest.mark.parametrize("seed", range(200))
def test_it_is_found_at_the_token_that_completes_it_however_the_answer_is_cut_into_steps(seed):
    rng = random.Random(seed)
    largest = rng.randint(1, 6)
    wanted = RepetitionDetection(largest, rng.randint(0, largest), rng.randint(2, 4))
    token_ids = [rng.randrange(2) for _ in range(60)]
    detector, read = RepetitionDetector(wanted), 0
    while read < len(token_ids):
        step = token_ids[read : read + rng.randint(1, 5)]
        end = detector.end_of(step, 0)
        if end is not None:
            assert by_definition(token_ids, wanted) == read + end
            return
        read += len(step)
    assert by_definition(token_ids, wanted) is None


def test_an_answer_does_not_end_before_the_place_that_it_must_reach():
    detector = RepetitionDetector(RepetitionDetection(1, 0, 2))
    assert detector.end_of([5, 5, 5], 3) is None
    assert detector.end_of([5, 5], 1) == 2
