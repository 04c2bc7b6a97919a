from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.core.hashing import root_hash, sequence_hashes, token_bytes
from penstock.engines.block_pool import BlockPool, CachedPrefix

BLOCK_SIZE = 2


def hashes(token_ids: list[int], salt: str = "") -> list[int]:
    return sequence_hashes(token_ids, BLOCK_SIZE, root_hash("m", salt))


def found(pool: BlockPool, token_ids: list[int], salt: str, max_blocks: int) -> list[int]:
    """The cached blocks of a prompt that nobody looked for before."""
    prefix = CachedPrefix(token_bytes(token_ids), salt, max_blocks)
    assert pool.follow(prefix) == bool(prefix.block_ids)
    return prefix.block_ids


def fill(pool: BlockPool, token_ids: list[int], salt: str = "") -> list[int]:
    """What a sequence does: take what is cached, allocate the rest, compute and cache it."""
    whole = len(token_ids) // BLOCK_SIZE
    block_ids = found(pool, token_ids, salt, whole)
    pool.acquire(block_ids)
    fresh = pool.allocate(whole - len(block_ids))
    assert fresh is not None
    first = len(block_ids)
    block_ids += fresh
    pool.cache(block_ids, first, salt, token_bytes(token_ids[first * BLOCK_SIZE : whole * BLOCK_SIZE]))
    return block_ids


@pytest.fixture
def pool():
    pool = BlockPool(8, BLOCK_SIZE, "m")
    yield pool
    pool.check()


def test_a_prompt_finds_what_an_earlier_one_left(pool: BlockPool):
    first = fill(pool, [1, 2, 3, 4])
    pool.release(first)
    assert found(pool, [1, 2, 3, 4, 5], "", 2) == first
    assert found(pool, [1, 2, 9, 9], "", 2) == first[:1]
    assert found(pool, [1, 2, 3, 4], "", 1) == first[:1]
    assert found(pool, [3, 4], "", 1) == []  # the same tokens behind another parent


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
    assert found(pool, [1, 2], "bob", 1) == []
    assert found(pool, [1, 2], "", 1) == []
    assert len(found(pool, [1, 2], "alice", 1)) == 1
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
    own = list(mine)
    pool.cache(mine, 0, "", token_bytes([1, 2]))
    pool.cache(theirs, 0, "", token_bytes([1, 2]))
    assert mine == theirs == own
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
    hits = found(pool, [1, 2, 3, 4], "", 2)
    assert pool.available_blocks == 8
    assert pool.available_besides(hits) == 6
    pool.acquire(hits)
    assert pool.available_blocks == pool.available_besides(hits) == 6


def test_a_followed_prefix_gains_what_others_compute_and_loses_what_is_evicted(pool: BlockPool):
    prefix = CachedPrefix(token_bytes([1, 2, 3, 4, 5, 6]), "", 3)
    assert not pool.follow(prefix)
    holder = fill(pool, [1, 2, 3, 4])
    assert pool.follow(prefix)
    assert prefix.block_ids == holder
    assert not pool.follow(prefix)
    pool.release(holder)
    first = fill(pool, [1, 2])  # which keeps that block
    everything = pool.allocate(7)
    assert everything
    assert pool.follow(prefix)
    assert prefix.block_ids == first
    pool.release(everything)
    fill(pool, [1, 2, 7, 8])
    assert not pool.follow(prefix)  # the same row of the pool may hold something else by now
    assert prefix.block_ids == first


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
        self.followed: list[CachedPrefix] = []
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
        block_ids = found(self.pool, token_ids, salt, whole)
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
        until = choice.draw(st.integers(i + 1, len(holder.prefixes)))
        tokens = token_bytes(holder.token_ids[i * BLOCK_SIZE : until * BLOCK_SIZE])
        self.pool.cache(holder.block_ids, i, holder.salt, tokens)
        for j in range(i, until):
            prefix = (holder.salt, tuple(holder.token_ids[: (j + 1) * BLOCK_SIZE]))
            holder.prefixes[j] = prefix
            self.cached.setdefault(prefix, 0)

    @precondition(lambda self: self.holders)
    @rule(choice=st.data())
    def end(self, choice: st.DataObject) -> None:
        self.let_go(choice.draw(st.sampled_from(self.holders)))

    @rule(token_ids=st.lists(st.integers(0, 1), max_size=8), salt=st.sampled_from(["", "s"]))
    def follow(self, token_ids: list[int], salt: str) -> None:
        self.followed.append(CachedPrefix(token_bytes(token_ids), salt, len(token_ids) // BLOCK_SIZE))

    @precondition(lambda self: self.followed)
    @rule(choice=st.data())
    def look_again(self, choice: st.DataObject) -> None:
        prefix = choice.draw(st.sampled_from(self.followed))
        before = list(prefix.block_ids)
        changed = self.pool.follow(prefix)
        fresh = CachedPrefix(prefix.tokens, prefix.salt, prefix.max_blocks)
        self.pool.follow(fresh)
        assert prefix.block_ids == fresh.block_ids
        assert changed or prefix.block_ids == before

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
