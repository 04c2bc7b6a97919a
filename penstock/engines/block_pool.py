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

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from penstock.core.hashing import TOKEN_BYTES, packed_block_hash, root_hash

_Parent = int | str
"""The block before, or the cache salt for a first block."""

_Key = tuple[_Parent, bytes]


@dataclass(slots=True, eq=False)
class CachedPrefix:
    """The cached blocks that a sequence could begin with, as of the last `BlockPool.follow`. It references
    none of them: they may be evicted, and more may come."""

    tokens: bytes  # as hashing.token_bytes packs them
    salt: str
    max_blocks: int  # `tokens` has so many whole blocks
    block_ids: list[int] = field(default_factory=list)  # first to last
    keys: list[_Key] = field(default_factory=list)  # of these, the very objects
    next_key: _Key | None = None  # of the block after them, once it was looked for


class BlockPool:
    """Reference counts and the prefix cache over `total_blocks` blocks of `block_size` tokens.

    Args:
        model: the served name; with the cache salt it seeds the sequence hashes.
    """

    def __init__(self, total_blocks: int, block_size: int, model: str = "") -> None:
        self.total_blocks = total_blocks
        self.block_size = block_size
        self._block_bytes = block_size * TOKEN_BYTES
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
        return self.available_blocks - len(self._idle.keys() & block_ids)

    def follow(self, prefix: CachedPrefix) -> bool:
        """Bring a prefix up to date: afterwards its blocks are those of the longest cached one. Returns
        whether there are others than before. Nothing is acquired, and nothing counts as used.

        Where nothing has changed this looks at two blocks. Each time a block is cached its key is a new
        object, and a parent outlives its children: as long as the last block found has the key object that
        it had then, all those before it are what they were."""
        block_ids, keys, tokens, width = prefix.block_ids, prefix.keys, prefix.tokens, self._block_bytes
        before = len(block_ids)
        while keys and self._keys[block_ids[-1]] is not keys[-1]:
            block_ids.pop()
            keys.pop()
            prefix.next_key = None
        lost = len(block_ids) < before
        while len(block_ids) < prefix.max_blocks:
            key = prefix.next_key
            if key is None:
                start = len(block_ids) * width
                key = (block_ids[-1] if block_ids else prefix.salt, tokens[start : start + width])
            block = self._cached.get(key)
            if block is None:
                prefix.next_key = key
                break
            found = self._keys[block]
            assert found is not None, f"block {block} is cached and has no key"
            block_ids.append(block)
            keys.append(found)
            prefix.next_key = None
        return lost or len(block_ids) > before

    def acquire(self, block_ids: Sequence[int]) -> None:
        """Reference cached blocks, a whole prefix as `match` returns it."""
        references, idle = self._references, self._idle
        for block in block_ids:
            if not references[block]:
                del idle[block]
            references[block] += 1

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks, each with one reference and nothing cached; None when there are fewer."""
        if count > self.available_blocks:
            return None
        free = self._free
        taken = [free.pop() for _ in range(min(count, len(free)))]
        self._evict(count - len(taken), taken)
        for block in taken:
            self._references[block] = 1
        return taken

    def release(self, block_ids: Sequence[int]) -> None:
        """Drop one reference of each block of a sequence, given first to last as the sequence has them.

        Those that nobody else uses become idle where cached, else free."""
        references, keys, idle = self._references, self._keys, self._idle
        for block in reversed(block_ids):
            left = references[block] = references[block] - 1
            if left:
                continue
            if keys[block] is None:
                self._free.append(block)
            else:
                idle[block] = None

    def cache(self, block_ids: list[int], first: int, salt: str, tokens: bytes) -> None:
        """Enter the blocks of a sequence whose KV is now complete, from `block_ids[first]` on.

        Args:
            block_ids: all blocks of the sequence, which references them. Those before `first` are cached,
                the others not. One whose KV was cached before, in another block, is replaced by that
                one here: the sequence's reference has moved, and the sequence's own block is free.
            salt: its cache salt.
            tokens: the tokens of the blocks to enter, as hashing.token_bytes packs them.
        """
        width, cached, hashes = self._block_bytes, self._cached, self._hashes
        parent: _Parent = block_ids[first - 1] if first else salt
        sequence_hash = hashes[block_ids[first - 1]] if first else root_hash(self._model, salt)
        for index, start in enumerate(range(0, len(tokens), width), first):
            key = (parent, tokens[start : start + width])
            block = block_ids[index]
            parent = cached.setdefault(key, block)
            if parent != block:
                self.acquire([parent])
                self.release([block])
                block_ids[index] = parent
                sequence_hash = hashes[parent]
                continue
            sequence_hash = packed_block_hash(key[1], sequence_hash)
            self._keys[block] = key
            hashes[block] = sequence_hash
            if sequence_hash in self._removed:
                del self._removed[sequence_hash]
            else:
                self._stored[sequence_hash] = None

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

    def _evict(self, count: int, taken: list[int]) -> None:
        """Add the `count` blocks to `taken` that were used least recently among the idle."""
        idle, keys, hashes, stored = self._idle, self._keys, self._hashes, self._stored
        for _ in range(count):
            block, _ = idle.popitem(last=False)
            key = keys[block]
            assert key is not None, f"idle block {block} is not cached"
            del self._cached[key]
            keys[block] = None
            sequence_hash = hashes[block]
            if sequence_hash in stored:
                del stored[sequence_hash]
            else:
                self._removed[sequence_hash] = None
            taken.append(block)

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
