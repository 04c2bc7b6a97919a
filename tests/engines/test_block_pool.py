from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.core.hashing import root_hash, sequence_hashes
from penstock.engines.block_pool import BlockPool

BLOCK_SIZE = 2


def hashes(token_ids: list[int], salt: str = "") -> list[int]:
    return sequence_hashes(token_ids, BLOCK_SIZE, root_hash("m", salt))


def fill(pool: BlockPool, token_ids: list[int], salt: str = "") -> list[int]:
    """What a sequence does: take what is cached, allocate the rest, compute and cache it."""
    whole = len(token_ids) // BLOCK_SIZE
    block_ids = pool.match(token_ids, salt, whole)
    pool.acquire(block_ids)
    fresh = pool.allocate(whole - len(block_ids))
    assert fresh is not None
    first = len(block_ids)
    block_ids += fresh
    for i in range(first, whole):
        parent = block_ids[i - 1] if i else salt
        block_ids[i] = pool.cache(block_ids[i], parent, token_ids[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE])
    return block_ids


@pytest.fixture
def pool():
    pool = BlockPool(8, BLOCK_SIZE, "m")
    yield pool
    pool.check()


def test_a_prompt_finds_what_an_earlier_one_left(pool: BlockPool):
    first = fill(pool, [1, 2, 3, 4])
    pool.release(first)
    assert pool.match([1, 2, 3, 4, 5], "", 2) == first
    assert pool.match([1, 2, 9, 9], "", 2) == first[:1]
    assert pool.match([1, 2, 3, 4], "", 1) == first[:1]
    assert pool.match([3, 4], "", 1) == []  # the same tokens behind another parent


def test_references_and_hashes_of_cached_blocks(pool: BlockPool):
    block_ids = fill(pool, [1, 2, 3, 4])
    pool.acquire(block_ids[:1])
    assert [pool.references(block) for block in block_ids] == [2, 1]
    assert pool.cached_hashes() == hashes([1, 2, 3, 4])
    pool.check_references([block_ids, block_ids[:1]])
    with pytest.raises(AssertionError, match="more or fewer references"):
        pool.check_references([block_ids])


def test_a_cache_salt_is_a_cache_of_its_own(pool: BlockPool):
    pool.release(fill(pool, [1, 2], "alice"))
    assert pool.match([1, 2], "bob", 1) == []
    assert pool.match([1, 2], "", 1) == []
    assert len(pool.match([1, 2], "alice", 1)) == 1
    assert pool.drain() == (hashes([1, 2], "alice"), [])


def test_evicts_the_least_recently_used_leaf_first(pool: BlockPool):
    old = fill(pool, [1, 2, 3, 4, 5, 6])
    new = fill(pool, [7, 8, 9, 10])
    pool.release(old)
    pool.release(new)
    pool.release(fill(pool, [1, 2]))  # the old prefix's first block is used once more
    pool.drain()
    taken = [pool.allocate(1) for _ in range(8)]
    assert None not in taken
    assert pool.allocate(1) is None
    _, removed = pool.drain()
    a, b, c = hashes([1, 2, 3, 4, 5, 6])
    d, e = hashes([7, 8, 9, 10])
    assert removed == [c, b, e, d, a]


def test_allocating_too_much_takes_nothing(pool: BlockPool):
    assert pool.allocate(9) is None
    assert pool.available_blocks == 8
    assert pool.allocate(8) is not None
    assert pool.used_blocks == 8


def test_the_same_block_computed_twice_is_kept_once(pool: BlockPool):
    mine, theirs = pool.allocate(1), pool.allocate(1)
    assert mine
    assert theirs
    assert pool.cache(mine[0], "", [1, 2]) == mine[0]
    assert pool.cache(theirs[0], "", [1, 2]) == mine[0]
    assert pool.used_blocks == 1
    assert pool.drain() == (hashes([1, 2]), [])
    pool.release(mine)
    assert pool.used_blocks == 1  # the second sequence still uses it
    pool.release(mine)
    assert pool.used_blocks == 0
    assert pool.cached_blocks == 1


def test_events_are_net_between_drains(pool: BlockPool):
    block_ids = fill(pool, [1, 2])
    pool.release(block_ids)
    everything = pool.allocate(8)
    assert everything
    assert pool.drain() == ([], [])  # came and went
    pool.release(everything)
    pool.release(fill(pool, [1, 2]))
    assert pool.drain() == (hashes([1, 2]), [])
    everything = pool.allocate(8)
    assert everything
    pool.release(everything)
    fill(pool, [1, 2])
    assert pool.drain() == ([], [])  # went and came back


def test_available_besides_does_not_count_hits_twice(pool: BlockPool):
    pool.release(fill(pool, [1, 2, 3, 4]))
    hits = pool.match([1, 2, 3, 4], "", 2)
    assert pool.available_blocks == 8
    assert pool.available_besides(hits) == 6
    pool.acquire(hits)
    assert pool.available_blocks == pool.available_besides(hits) == 6


Prefix = tuple[str, tuple[int, ...]]
"""A cache salt, and all tokens up to the end of a block."""


@dataclass
class Holder:
    """A sequence that holds blocks; `prefixes[i]` is None while its block i is not cached."""

    salt: str
    token_ids: list[int]
    block_ids: list[int]
    prefixes: list[Prefix | None]


class PoolAgainstOracle(RuleBasedStateMachine):
    """The oracle knows prefixes by their tokens, and when each was last let go; it looks at all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6, BLOCK_SIZE, "m")
        self.holders: list[Holder] = []
        self.cached: dict[Prefix, int] = {}  # when it was last let go
        self.reported: set[int] = set()
        self.time = 0

    def idle(self) -> list[Prefix]:
        held = {prefix for holder in self.holders for prefix in holder.prefixes}
        return [prefix for prefix in self.cached if prefix not in held]

    def free_blocks(self) -> int:
        private = sum(holder.prefixes.count(None) for holder in self.holders)
        return self.pool.total_blocks - private - len(self.cached)

    def evict(self) -> None:
        leaves = [
            (salt, token_ids)
            for salt, token_ids in self.idle()
            if not any(
                other != token_ids and other_salt == salt and other[: len(token_ids)] == token_ids
                for other_salt, other in self.cached
            )
        ]
        del self.cached[min(leaves, key=lambda prefix: self.cached[prefix])]

    def let_go(self, holder: Holder) -> None:
        self.holders.remove(holder)
        idle = self.idle()
        for prefix in reversed(holder.prefixes):
            self.time += 1
            if prefix is not None and prefix in idle:
                self.cached[prefix] = self.time
        self.pool.release(holder.block_ids)

    @rule(token_ids=st.lists(st.integers(0, 1), max_size=8), salt=st.sampled_from(["", "s"]))
    def begin(self, token_ids: list[int], salt: str) -> None:
        whole = len(token_ids) // BLOCK_SIZE
        chain: list[Prefix | None] = [
            (salt, tuple(token_ids[: end * BLOCK_SIZE])) for end in range(1, whole + 1)
        ]
        hits = next((i for i, prefix in enumerate(chain) if prefix not in self.cached), whole)
        block_ids = self.pool.match(token_ids, salt, whole)
        assert len(block_ids) == hits
        needed = whole - hits
        available = self.free_blocks() + len(
            [prefix for prefix in self.idle() if prefix not in chain[:hits]]
        )
        assert self.pool.available_besides(block_ids) == available
        self.pool.acquire(block_ids)
        holder = Holder(salt, token_ids, block_ids, chain[:hits])
        self.holders.append(holder)
        fresh = self.pool.allocate(needed)
        if needed > available:
            assert fresh is None
            self.let_go(holder)
            return
        assert fresh is not None
        for _ in range(needed - self.free_blocks()):
            self.evict()
        holder.block_ids = block_ids + fresh
        holder.prefixes += [None] * needed

    @precondition(lambda self: self.holders)
    @rule(choice=st.data())
    def compute(self, choice: st.DataObject) -> None:
        holder = choice.draw(st.sampled_from(self.holders))
        if None not in holder.prefixes:
            return
        i = holder.prefixes.index(None)
        parent = holder.block_ids[i - 1] if i else holder.salt
        token_ids = holder.token_ids[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE]
        holder.block_ids[i] = self.pool.cache(holder.block_ids[i], parent, token_ids)
        prefix = (holder.salt, tuple(holder.token_ids[: (i + 1) * BLOCK_SIZE]))
        holder.prefixes[i] = prefix
        self.cached.setdefault(prefix, 0)

    @precondition(lambda self: self.holders)
    @rule(choice=st.data())
    def end(self, choice: st.DataObject) -> None:
        self.let_go(choice.draw(st.sampled_from(self.holders)))

    @rule()
    def report(self) -> None:
        stored, removed = self.pool.drain()
        assert not self.reported.intersection(stored)
        assert self.reported.issuperset(removed)
        self.reported = (self.reported - set(removed)) | set(stored)
        expected = {hashes(list(token_ids), salt)[-1] for salt, token_ids in self.cached}
        assert self.reported == expected

    @invariant()
    def agree(self) -> None:
        self.pool.check()
        assert self.pool.cached_blocks == len(self.cached)
        assert self.pool.available_blocks == self.free_blocks() + len(self.idle())


TestPoolAgainstOracle = PoolAgainstOracle.TestCase
TestPoolAgainstOracle.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
