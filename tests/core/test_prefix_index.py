"""The index against a brute-force oracle, and the cost of forgetting."""

from functools import reduce
from operator import xor

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from penstock.core.prefix_index import MAX_SHARED, SWEEP_BLOCKS, PrefixIndex

# Few distinct hashes and workers, so that sequences of events meet; 1024 apart shares a shard.
HASHES = st.sampled_from([1, 2, 3, 1025, 1026, 1027, 2**64 - 1, 2049])
WORKERS = st.sampled_from(["a", "b", "c", "d"])


def oracle_overlaps(cached: dict[str, set[int]], hashes: list[int]) -> dict[str, int]:
    found = {}
    for worker, blocks in cached.items():
        depth = 0
        while depth < len(hashes) and hashes[depth] in blocks:
            depth += 1
        if depth:
            found[worker] = depth
    return found


class IndexAgainstOracle(RuleBasedStateMachine):
    """Any sequence of events leaves the index saying what plain sets of hashes say."""

    sweep_blocks = SWEEP_BLOCKS

    @initialize()
    def start(self) -> None:
        self.index = PrefixIndex(sweep_blocks=self.sweep_blocks)
        self.cached: dict[str, set[int]] = {}

    @rule(worker=WORKERS)
    def add(self, worker: str) -> None:
        self.index.add_worker(worker)
        self.cached.setdefault(worker, set())

    @rule(worker=WORKERS)
    def remove(self, worker: str) -> None:
        self.index.remove_worker(worker)
        self.cached.pop(worker, None)

    @rule(worker=WORKERS, hashes=st.lists(HASHES, max_size=8))
    def stored(self, worker: str, hashes: list[int]) -> None:
        if worker in self.cached:
            self.index.stored(worker, hashes)
            self.cached[worker].update(hashes)

    @rule(worker=WORKERS, hashes=st.lists(HASHES, max_size=4))
    def removed(self, worker: str, hashes: list[int]) -> None:
        if worker in self.cached:
            self.index.removed(worker, hashes)
            self.cached[worker].difference_update(hashes)

    @rule(worker=WORKERS, hashes=st.lists(HASHES, max_size=8))
    def replace(self, worker: str, hashes: list[int]) -> None:
        if worker in self.cached:
            self.index.cleared(worker)
            self.index.stored(worker, hashes)
            self.cached[worker] = set(hashes)

    @rule(worker=WORKERS)
    def cleared(self, worker: str) -> None:
        if worker in self.cached:
            self.index.cleared(worker)
            self.cached[worker] = set()

    @rule()
    def sweep(self) -> None:
        self.index.sweep()

    @rule(hashes=st.lists(HASHES, max_size=6))
    def query(self, hashes: list[int]) -> None:
        assert self.index.overlaps(hashes) == oracle_overlaps(self.cached, hashes)

    @invariant()
    def counts_agree(self) -> None:
        if hasattr(self, "index"):
            assert {w: self.index.held(w) for w in self.index.workers} == {
                w: len(blocks) for w, blocks in self.cached.items()
            }

    @invariant()
    def contents_agree(self) -> None:
        if hasattr(self, "index"):
            digests = {worker: reduce(xor, blocks, 0) for worker, blocks in self.cached.items()}
            assert self.index.blocks() == self.cached
            assert self.index.digests() == digests

    def teardown(self) -> None:
        if not hasattr(self, "index"):
            return
        for worker in list(self.cached):
            self.index.remove_worker(worker)
        while self.index.sweep():
            pass
        assert len(self.index) == 0


class SlowSweepAgainstOracle(IndexAgainstOracle):
    """The same when a sweep takes many events: retired slots are then met at every stage."""

    sweep_blocks = 1


TestIndexAgainstOracle = IndexAgainstOracle.TestCase
TestSlowSweepAgainstOracle = SlowSweepAgainstOracle.TestCase
for case in (TestIndexAgainstOracle, TestSlowSweepAgainstOracle):
    case.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_hole_ends_the_overlap() -> None:
    index = PrefixIndex()
    index.add_worker("w")
    index.stored("w", [1, 2, 3, 4])
    index.removed("w", [2])
    assert index.overlaps([1, 2, 3, 4]) == {"w": 1}


def test_no_hashes_no_overlap() -> None:
    index = PrefixIndex()
    index.add_worker("w")
    assert index.overlaps([]) == {}
    assert index.overlaps([7]) == {}


def test_a_worker_that_returns_has_nothing_before_its_snapshot() -> None:
    index = PrefixIndex()
    index.add_worker("w")
    index.stored("w", [1, 2])
    index.remove_worker("w")
    index.add_worker("w")
    assert index.overlaps([1, 2]) == {}
    index.stored("w", [1])
    assert index.overlaps([1, 2]) == {"w": 1}


def test_unknown_workers() -> None:
    index = PrefixIndex()
    index.remove_worker("nobody")
    for event in (index.stored, index.removed):
        with pytest.raises(KeyError):
            event("nobody", [1])
    with pytest.raises(KeyError):
        index.cleared("nobody")


def test_forgetting_sweeps_a_bounded_part_and_ends() -> None:
    index = PrefixIndex()
    for worker in ("gone", "stays"):
        index.add_worker(worker)
        index.stored(worker, range(30_000))
    index.remove_worker("gone")
    assert index.overlaps([1, 2]) == {"stays": 2}
    sweeps = 2  # removing did one, the last below finds the end
    while index.sweep():
        sweeps += 1
    assert 30_000 // SWEEP_BLOCKS <= sweeps <= 30_000 // SWEEP_BLOCKS + 2
    index.add_worker("new")
    assert index.overlaps([1]) == {"stays": 1}, "a swept slot starts empty"


def test_a_storm_of_clears_reuses_slots() -> None:
    index = PrefixIndex()
    index.add_worker("w")
    for round_ in range(1_000):
        index.stored("w", range(round_, round_ + 100))
        index.cleared("w")
    assert len(index._owners) < 10


def test_blocks_with_equal_workers_share_one_set_however_they_came_to_them() -> None:
    index = PrefixIndex()
    names = [f"w{number}" for number in range(300)]
    for name in names:
        index.add_worker(name)
    for name in names[-3:]:
        index.stored(name, range(100))
    for key in range(100, 200):
        for name in reversed(names[-4:]):
            index.stored(name, [key])
        index.removed(names[-4], [key])
    index.remove_worker(names[0])
    sets = [holders for shard in index._shards for holders in shard.values()]
    assert len(sets) == 200
    assert len(set(map(id, sets))) == 1


def test_sets_that_are_found_again_are_limited() -> None:
    index = PrefixIndex()
    for number in range(13):
        index.add_worker(f"w{number}")
    for subset in range(1, 2 * MAX_SHARED):
        for number in range(13):
            if subset >> number & 1:
                index.stored(f"w{number}", [subset])
    assert len(index._sets) <= MAX_SHARED
    assert index.overlaps([5]) == {"w0": 1, "w2": 1}
    assert index.overlaps([2 * MAX_SHARED - 1]) == {f"w{number}": 1 for number in range(13)}


def test_events_between_the_sweeps_of_one_shard_are_kept() -> None:
    """A sweep may end within a shard; what comes meanwhile stays."""
    index = PrefixIndex(sweep_blocks=2)
    for worker in ("gone", "stays"):
        index.add_worker(worker)
    same_shard = range(0, 1024 * 50, 1024)
    index.stored("gone", same_shard)
    index.remove_worker("gone")
    index.stored("stays", same_shard[:20])
    index.removed("stays", same_shard[5:10])
    while index.sweep():
        pass
    assert index.blocks() == {"stays": {*same_shard[:5], *same_shard[10:20]}}
    assert len(index) == 15
