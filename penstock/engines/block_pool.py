"""The block pool: who holds which KV block, and which prompts' KV is still there to be used again.

A block is one row of the KV pool, `block_size` tokens wide. It is in exactly one of three places:

    free        holds nothing worth keeping
    referenced  at least one sequence, pull or handoff uses it; it may also be cached
    idle        nobody uses it, but it is cached; taken, least recently used first, when `free` is empty

A block is cached once it is whole: under the key (its parent block, its tokens), where the parent of the
first block is the request's cache salt. The parent is named by its block id, so a key stands for a whole
prefix, compared token by token. Block ids can be reused without harm because a parent always outlives
its children:

    Whoever references a block references all its ancestors, and `release` lets go of children first. So
    a child is always before its parent in the queue of idle blocks: taking from the front is least
    recently used and leaf first at once, and no child is left with a parent that is something else now.

Two sequences may compute the same block at the same time. The first to finish caches its own; the second
is given that one in exchange (`cache` says so) and its own is freed. So a cached prefix has one copy.

Sequence hashes (core/hashing.py) are only reported, for routers; two prefixes of one hash would confuse a
router's estimate and nothing else.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from penstock.core.hashing import block_hash, root_hash

_Parent = int | str
"""The block before, or the cache salt for a first block."""

_Key = tuple[_Parent, bytes]


class BlockPool:
    """Reference counts and the prefix cache over `total_blocks` blocks of `block_size` tokens.

    Args:
        model: the served name; with the cache salt it seeds the sequence hashes.
    """

    def __init__(self, total_blocks: int, block_size: int, model: str = "") -> None:
        self.total_blocks = total_blocks
        self.block_size = block_size
        self._model = model
        self._free = list(range(total_blocks - 1, -1, -1))  # a stack, lowest id on top
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._references = [0] * total_blocks
        self._cached: dict[_Key, int] = {}
        self._keys: list[_Key | None] = [None] * total_blocks  # by block; None: not cached
        self._hashes = [0] * total_blocks  # by block; meaningful where cached
        self._stored: dict[int, None] = {}  # ordered sets: what changed since `drain`
        self._removed: dict[int, None] = {}

    @property
    def available_blocks(self) -> int:
        """Blocks that `allocate` could give now."""
        return len(self._free) + len(self._idle)

    @property
    def used_blocks(self) -> int:
        """Blocks that are referenced."""
        return self.total_blocks - self.available_blocks

    @property
    def cached_blocks(self) -> int:
        """Blocks that a prompt could hit, referenced or idle."""
        return len(self._cached)

    def cached_hashes(self) -> list[int]:
        """The sequence hashes of all cached blocks."""
        return [self._hashes[block] for block in self._cached.values()]

    def references(self, block: int) -> int:
        """How many sequences, pulls and handoffs use this block."""
        return self._references[block]

    def available_besides(self, block_ids: Sequence[int]) -> int:
        """Blocks that `allocate` could give once `block_ids` were acquired."""
        return self.available_blocks - sum(block in self._idle for block in block_ids)

    def match(self, token_ids: Sequence[int], salt: str, max_blocks: int) -> list[int]:
        """The cached blocks of the longest prefix of `token_ids`, at most `max_blocks`, first to last.

        Nothing is acquired, and nothing counts as used. `token_ids` has `max_blocks` whole blocks."""
        size, cached = self.block_size, self._cached
        found: list[int] = []
        parent: _Parent = salt
        for start in range(0, max_blocks * size, size):
            block = cached.get((parent, array("I", token_ids[start : start + size]).tobytes()))
            if block is None:
                break
            found.append(block)
            parent = block
        return found

    def acquire(self, block_ids: Sequence[int]) -> None:
        """Reference cached blocks, a whole prefix as `match` returns it."""
        for block in block_ids:
            if not self._references[block]:
                del self._idle[block]
            self._references[block] += 1

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks, each with one reference and nothing cached; None when there are fewer."""
        if count > self.available_blocks:
            return None
        taken = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in taken:
            self._references[block] = 1
        return taken

    def release(self, block_ids: Sequence[int]) -> None:
        """Drop one reference of each block of a sequence, given first to last as the sequence has them.

        Those that nobody else uses become idle where cached, else free."""
        for block in reversed(block_ids):
            self._references[block] -= 1
            if self._references[block]:
                continue
            if self._keys[block] is None:
                self._free.append(block)
            else:
                self._idle[block] = None

    def cache(self, block: int, parent: int | str, token_ids: Sequence[int]) -> int:
        """Enter a block whose KV is now complete.

        Args:
            block: referenced by the caller alone, not cached.
            parent: the cached block before it, referenced by the caller, or the cache salt.
            token_ids: its `block_size` tokens.

        Returns the block to use from now on: `block`, or one with the same KV that was cached before;
        then the caller's reference has moved to that one, and `block` is free.
        """
        key = (parent, array("I", token_ids).tobytes())
        twin = self._cached.get(key)
        if twin is not None:
            self.acquire([twin])
            self.release([block])
            return twin
        seed = self._hashes[parent] if isinstance(parent, int) else root_hash(self._model, parent)
        sequence_hash = block_hash(token_ids, seed)
        self._cached[key] = block
        self._keys[block] = key
        self._hashes[block] = sequence_hash
        if sequence_hash in self._removed:
            del self._removed[sequence_hash]
        else:
            self._stored[sequence_hash] = None
        return block

    def sequence_hash(self, block: int) -> int:
        """The sequence hash of a cached block."""
        return self._hashes[block]

    def drain(self) -> tuple[list[int], list[int]]:
        """(stored, removed): the sequence hashes that are new and gone since the last call, net: what
        came and went in between is in neither, and no hash is in both."""
        stored, removed = list(self._stored), list(self._removed)
        self._stored.clear()
        self._removed.clear()
        return stored, removed

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        key = self._keys[block]
        assert key is not None, f"idle block {block} is not cached"
        del self._cached[key]
        self._keys[block] = None
        sequence_hash = self._hashes[block]
        if sequence_hash in self._stored:
            del self._stored[sequence_hash]
        else:
            self._removed[sequence_hash] = None
        return block

    def check_references(self, holders: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless the references are exactly those of these holders, each given as its
        blocks. Costs O(total_blocks); for tests."""
        expected = [0] * self.total_blocks
        for block_ids in holders:
            for block in block_ids:
                expected[block] += 1
        if expected != self._references:
            wrong = [block for block, count in enumerate(expected) if count != self._references[block]]
            raise AssertionError(f"blocks {wrong[:8]} have more or fewer references than holders")

    def check(self) -> None:
        """Raise AssertionError unless every invariant above holds. Costs O(total_blocks); for tests."""
        free, idle = set(self._free), set(self._idle)
        referenced = {block for block, count in enumerate(self._references) if count}
        assert len(free) == len(self._free), "a block is free twice"
        assert len(free | idle | referenced) == self.total_blocks, "a block is lost"
        assert len(free) + len(idle) + len(referenced) == self.total_blocks, "a block is in two places"
        assert min(self._references, default=0) >= 0, "a block was released too often"
        cached = {block for block, key in enumerate(self._keys) if key is not None}
        assert idle <= cached, "an idle block is not cached"
        assert cached == set(self._cached.values()), "keys and blocks differ"
        order = {block: place for place, block in enumerate(self._idle)}
        for block in cached:
            key = self._keys[block]
            assert key is not None
            assert self._cached[key] == block, "a key names another block"
            parent = key[0]
            if isinstance(parent, str):
                continue
            assert parent in cached, "a child outlived its parent"
            if block in referenced:
                assert parent in referenced, "a child is referenced and its parent is not"
            elif parent in idle:
                assert order[block] < order[parent], "a parent would be taken before its child"
