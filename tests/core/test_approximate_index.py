"""What a worker has cached by all appearances, against a cache that evicts as engines do."""

from __future__ import annotations

from collections import OrderedDict
from random import Random

from penstock.core.approximate_index import ApproximateIndex


class Pool:
    """The prefix cache of an engine: the least recently used block goes first, a leaf before its parent."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._cached: OrderedDict[int, None] = OrderedDict()

    def compute(self, hashes: list[int]) -> int:
        """How many of the first blocks were there."""
        found = next((place for place, it in enumerate(hashes) if it not in self._cached), len(hashes))
        for it in reversed(hashes):
            self._cached[it] = None
            self._cached.move_to_end(it)
        while len(self._cached) > self._blocks:
            self._cached.popitem(last=False)
        return found


def wrong_share(pool_blocks: int, claimed_blocks: int, *, hidden: int, drop_after: int = 0) -> float:
    """Of the blocks of sessions' prompts that were predicted wrongly, in the last half of a long load. Each
    prompt of this frontend is followed by so many `hidden` blocks of others."""
    rng, pool, index = Random(1), Pool(pool_blocks), ApproximateIndex()
    index.add_worker("w", claimed_blocks)
    sessions = {number: [number << 32] for number in range(40)}
    blocks = wrong = 0
    for turn in range(4000):
        session = sessions[rng.randrange(40)]
        if len(session) > 60:
            del session[1:]
        session += [session[-1] + more + 1 for more in range(5)]
        predicted, found = index.overlap("w", session), pool.compute(session)
        index.found("w", session, found)
        index.used("w", session, len(session) - found)
        if hidden:
            pool.compute([(turn << 40) + number for number in range(hidden)])
        if turn > 2000:
            blocks += len(session)
            wrong += abs(predicted - found)
    return wrong / blocks


def test_what_one_frontend_sent_is_foreseen_until_it_is_evicted() -> None:
    assert wrong_share(1_000_000, 1_000_000, hidden=0) == 0.0
    assert wrong_share(600, 600, hidden=0) < 0.1


def test_the_lifetime_is_learned_where_others_use_the_worker_too() -> None:
    assert wrong_share(1000, 1000, hidden=100) < 0.15


def test_what_was_used_longer_ago_than_its_lifetime_does_not_count() -> None:
    index = ApproximateIndex()
    index.add_worker("w", 1000)
    index.used("w", [1, 2, 3])
    assert index.overlap("w", [1, 2, 3, 4]) == 3
    for number in range(100):  # each time, what was used 200 blocks ago is gone
        prompt = [1000 * number + block for block in range(200)]
        index.used("w", prompt)
        index.used("w", [1000 * number - block for block in range(1, 201)])
        index.found("w", prompt, 0)
    assert index.lifetime("w") < 200
    assert index.overlap("w", [1, 2, 3]) == 0
    for number in range(100):  # and now it stays
        prompt = [-1000 * number - block for block in range(1, 201)]
        index.used("w", prompt)
        index.used("w", [10_000_000 + 1000 * number + block for block in range(200)])
        index.found("w", prompt, 200)
    assert index.lifetime("w") == 1000


def test_a_worker_has_no_more_blocks_than_its_pool_and_loses_the_ends_of_prefixes_first() -> None:
    index = ApproximateIndex()
    index.add_worker("w", 10)
    index.used("w", list(range(8)))
    index.used("w", list(range(100, 106)))
    assert index.held("w") == 10
    assert index.overlap("w", list(range(8))) == 4
    assert index.overlap("w", list(range(100, 106))) == 6


def test_workers_are_apart_and_begin_with_nothing() -> None:
    index = ApproximateIndex()
    for worker in ("a", "b"):
        index.add_worker(worker, 100)
    index.used("a", [1, 2])
    assert (index.overlap("a", [1, 2]), index.overlap("b", [1, 2])) == (2, 0)
    index.add_worker("a", 100)
    assert index.held("a") == 2
    index.remove_worker("a")
    assert "a" not in index
    index.add_worker("a", 100)
    assert index.held("a") == 0
