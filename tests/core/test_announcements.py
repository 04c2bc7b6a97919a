"""What events say of the blocks that answers were computed in."""

from __future__ import annotations

import pytest

from penstock.core.announcements import MAX_UNSETTLED, OTHER_SIZES, SETTLE_STEPS, Announcements
from penstock.core.hashing import root_hash, sequence_hashes
from penstock.core.overlap_check import Announcement
from penstock.core.prefix_index import PrefixIndex

ROOT = root_hash("m")
TOKENS = list(range(640))


class Worker:
    """One worker, which computes prompts; by and by its events come."""

    def __init__(self) -> None:
        self.index = PrefixIndex()
        self.index.add_worker("w")
        self.announcements = Announcements(self.index)
        self.announcements.add_worker("w", 16)
        self.steps = 0
        self.named_before = 0  # when the latest prompt was sent
        self._first = 0

    def tells(self, hashes: list[int]) -> None:
        self.index.stored("w", hashes)
        self.announcements.named("w", len(hashes))

    def computes(self) -> tuple[list[int], list[int]]:
        """The next prompt, and the hashes of its blocks."""
        self._first += 1000
        self.named_before = self.announcements.named("w")
        tokens = [self._first + each for each in TOKENS]
        return tokens, sequence_hashes(tokens, 16, ROOT)

    def leaves(self, tokens: list[int], hashes: list[int]) -> list[Announcement]:
        known = self.announcements.computed("w", self.steps, self.named_before, hashes, tokens, ROOT)
        return list(known)


def test_blocks_that_were_named_are_known_at_once() -> None:
    worker = Worker()
    tokens, hashes = worker.computes()
    worker.tells(hashes)
    assert worker.leaves(tokens, hashes) == [Announcement(1.0)]


def test_events_that_come_a_little_later_count_as_well() -> None:
    worker = Worker()
    prompt, late = worker.computes(), worker.computes()
    assert worker.leaves(*prompt) == []
    worker.tells(prompt[1])
    worker.steps += SETTLE_STEPS - 1
    assert worker.leaves(*late) == [], "not settled yet"
    worker.steps += 1
    worker.tells(late[1])
    assert worker.leaves(*late) == [Announcement(1.0), Announcement(1.0)]


@pytest.mark.parametrize("others", [[], [1, 2, 3]])
def test_no_event_at_all_is_told_from_events_of_other_blocks(others: list[int]) -> None:
    worker = Worker()
    prompt = worker.computes()
    worker.tells(others)
    assert worker.leaves(*prompt) == []
    worker.steps += SETTLE_STEPS
    worker.tells([4, 5, 6])  # when it had left
    assert worker.leaves(*worker.computes()) == [Announcement(0.0, silent=not others)]


def test_blocks_of_another_size_are_recognized() -> None:
    for size in OTHER_SIZES:
        worker = Worker()
        tokens, hashes = worker.computes()
        if size == 16 or size > len(tokens):
            continue
        worker.tells(sequence_hashes(tokens, size, ROOT))
        worker.leaves(tokens, hashes)
        worker.steps += SETTLE_STEPS
        assert worker.leaves(*worker.computes()) == [Announcement(0.0, block_size=size)]


def test_half_of_the_blocks_named_is_half_announced() -> None:
    worker = Worker()
    tokens, hashes = worker.computes()
    worker.tells(hashes[: len(hashes) // 2])
    worker.leaves(tokens, hashes)
    worker.steps += SETTLE_STEPS
    assert worker.leaves(*worker.computes()) == [Announcement(0.5)]


def test_answers_that_wait_are_limited_and_unknown_workers_ignored() -> None:
    worker = Worker()
    for _ in range(2 * MAX_UNSETTLED):
        worker.leaves(*worker.computes())
    worker.steps += SETTLE_STEPS
    assert len(worker.leaves(*worker.computes())) == MAX_UNSETTLED
    worker.announcements.remove_worker("w")
    assert worker.leaves(*worker.computes()) == []
    assert worker.leaves(TOKENS, []) == []
