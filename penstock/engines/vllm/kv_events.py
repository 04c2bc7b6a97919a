"""vLLM's KV events, as changes of the set of cached blocks under our own names.

vLLM names blocks by hashes that depend on its version, on settings, and on how Python pickles. Its events
carry the tokens too, so blocks are named here from those, chained as vLLM chains them: by the parent's
hash, which leads to the parent's name. A block is *unnamed* when its name cannot be known: its parent was
missed, or it holds more than text. Unnamed blocks are remembered, but are in no set.

Source of the format: vllm/distributed/kv_events.py of vLLM 0.32. One payload is the msgpack array
`[ts, [event, ...], rank]`.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from penstock.core.hashing import root_hash, sequence_hashes
from penstock.core.prefix_index import most_blocks
from penstock.errors import ProtocolError
from penstock.shapes import MAX_POOL_BLOCKS, BlockSize, Count, TokenIds, Word

EngineHash = int | Annotated[bytes, Meta(max_length=64)]
"""vLLM's own name for a block; which of the two is a setting of vLLM's."""

EngineHashes = Annotated[list[EngineHash], Meta(max_length=MAX_POOL_BLOCKS)]

FULL_ATTENTION = (None, "full_attention", "mla_attention", "sink_full_attention")
"""Kinds of cache that keep every token of a prefix. The others of a hybrid model say nothing about one."""

DEVICE = (None, "GPU")
"""What vLLM calls the device's own cache, also on a CPU; the rest is offloaded."""


class Changes(msgspec.Struct):
    """How the set of cached blocks has changed, as sequence hashes. The two lists are disjoint."""

    stored: list[int] = []
    removed: list[int] = []


class BlockStored(msgspec.Struct, tag=True):
    """One block after the other of a prefix."""

    block_hashes: EngineHashes
    parent_block_hash: EngineHash | None
    token_ids: TokenIds
    block_size: BlockSize
    medium: Word | None = None
    lora_name: Word | None = None
    extra_keys: list[list[Any] | None] | None = None  # per block: LoRA, multimodal, salt, embeddings
    group_idx: Count | None = None
    kv_cache_spec_kind: Word | None = None


class BlockRemoved(msgspec.Struct, tag=True):
    """Evicted."""

    block_hashes: EngineHashes
    medium: Word | None = None
    group_idx: Count | None = None


class AllBlocksCleared(msgspec.Struct, tag=True):
    """The whole cache was dropped."""


class _Batch(msgspec.Struct, array_like=True):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]


_DECODER = msgspec.msgpack.Decoder(_Batch)


class _Rank:
    """The cache of one data parallel rank."""

    def __init__(self) -> None:
        self.names: dict[EngineHash, int | None] = {}  # None: unnamed
        self.copies: dict[EngineHash, int] = {}  # beside the first: vLLM may hold equal blocks twice


class CacheEvents:
    """What all ranks of one engine have cached.

    Args:
        model: the served name, which seeds the block hashes.
        block_size: in tokens.
        total_blocks: of all ranks together.
    """

    def __init__(self, model: str, block_size: int, total_blocks: int) -> None:
        self.unnamed = 0  # blocks that were stored without a name, so far
        self._model = model
        self._block_size = block_size
        self._most_blocks = most_blocks(total_blocks)
        self._ranks: dict[int, _Rank] = {}
        self._ignored_groups: set[int | None] = set()
        self._holders: dict[int, int] = {}  # sequence hash -> how many entries of `names` have it
        self._stored: set[int] = set()  # since the last `drain`
        self._removed: set[int] = set()

    def __len__(self) -> int:
        return len(self._holders)

    def __contains__(self, sequence_hash: object) -> bool:
        """Whether any rank has this block."""
        return sequence_hash in self._holders

    def apply(self, rank: int, payload: bytes) -> None:
        """Take one payload. Raises ProtocolError when it makes no sense, or the rank has more blocks than
        there can be: then nothing that is known of that rank is of use any more."""
        try:
            batch = _DECODER.decode(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"KV events of rank {rank}: {error}") from error
        for event in batch.events:
            if isinstance(event, BlockStored):
                self._check(rank, event)
        cache = self._ranks.setdefault(rank, _Rank())
        for event in batch.events:
            match event:
                case BlockStored():
                    self._store(cache, event)
                case BlockRemoved():
                    self._remove(cache, event)
                case AllBlocksCleared():
                    self._forget(cache)
        if len(cache.names) > self._most_blocks:
            raise ProtocolError(f"KV events of rank {rank}: over {self._most_blocks} blocks are cached")

    def forget(self, rank: int) -> None:
        """Nothing is known of this rank any more: some of its events were lost."""
        self._forget(self._ranks.setdefault(rank, _Rank()))

    def forget_all(self) -> None:
        """The same for all ranks."""
        for rank in self._ranks:
            self.forget(rank)

    def drain(self) -> Changes:
        """What has changed since the last call."""
        changes = Changes(list(self._stored), list(self._removed))
        self._stored, self._removed = set(), set()
        return changes

    # --- events -------------------------------------------------------------------------------------

    def _check(self, rank: int, event: BlockStored) -> None:
        if event.medium not in DEVICE or event.kv_cache_spec_kind not in FULL_ATTENTION:
            return
        if event.block_size != self._block_size:
            raise ProtocolError(
                f"KV events of rank {rank}: block_size is {event.block_size}, expected {self._block_size}"
            )
        blocks, keys = len(event.block_hashes), event.extra_keys
        if len(event.token_ids) != blocks * event.block_size or (keys and len(keys) != blocks):
            raise ProtocolError(
                f"KV events of rank {rank}: {blocks} block_hashes, {len(event.token_ids)} token_ids"
                f" and {len(keys or ())} extra_keys do not fit together"
            )

    def _store(self, cache: _Rank, event: BlockStored) -> None:
        if event.medium not in DEVICE:
            return
        if event.kv_cache_spec_kind not in FULL_ATTENTION:
            self._ignored_groups.add(event.group_idx)
            return
        for engine_hash, name in zip(event.block_hashes, self._names(cache, event), strict=True):
            known = engine_hash in cache.names
            if known:
                cache.copies[engine_hash] = cache.copies.get(engine_hash, 0) + 1
            if name is None:
                self.unnamed += not known
                cache.names.setdefault(engine_hash, None)
            elif cache.names.get(engine_hash) is None:  # new, or its parent is known only now
                cache.names[engine_hash] = name
                self._hold(name)

    def _names(self, cache: _Rank, event: BlockStored) -> list[int | None]:
        """Our names for the event's blocks."""
        keys = [_other_keys(event, i) for i in range(len(event.block_hashes))]
        if event.parent_block_hash is not None:
            parent = cache.names.get(event.parent_block_hash)
        elif not keys or _salt(keys[0]) is None:
            parent = None
        else:
            parent = root_hash(self._model, _salt(keys[0]) or "", event.lora_name or "")
            keys[0] = []
        # From the first block that holds more than text on, nothing can be named.
        textual = next((i for i, other in enumerate(keys) if other), len(keys))
        if parent is None:
            textual = 0
        end = textual * self._block_size
        named = sequence_hashes(event.token_ids[:end], self._block_size, parent or 0)
        return [*named, *[None] * (len(keys) - textual)]

    def _remove(self, cache: _Rank, event: BlockRemoved) -> None:
        if event.medium not in DEVICE or event.group_idx in self._ignored_groups:
            return
        for engine_hash in event.block_hashes:
            copies = cache.copies.get(engine_hash, 0)
            if copies > 1:
                cache.copies[engine_hash] = copies - 1
            elif copies:
                del cache.copies[engine_hash]
            else:
                self._let_go(cache.names.pop(engine_hash, None))  # unknown after a gap

    def _forget(self, cache: _Rank) -> None:
        for name in cache.names.values():
            self._let_go(name)
        cache.names.clear()
        cache.copies.clear()

    # --- the union over ranks -----------------------------------------------------------------------

    def _hold(self, name: int) -> None:
        holders = self._holders.get(name, 0)
        self._holders[name] = holders + 1
        if not holders:
            if name in self._removed:
                self._removed.remove(name)
            else:
                self._stored.add(name)

    def _let_go(self, name: int | None) -> None:
        if name is None:
            return
        holders = self._holders[name] - 1
        if holders:
            self._holders[name] = holders
            return
        del self._holders[name]
        if name in self._stored:
            self._stored.remove(name)
        else:
            self._removed.add(name)


def _other_keys(event: BlockStored, block: int) -> list[Any]:
    """A block's extra keys without the LoRA's name, which comes first."""
    keys = list((event.extra_keys[block] if event.extra_keys else None) or ())
    return keys[1:] if event.lora_name and keys[:1] == [event.lora_name] else keys


def _salt(keys: list[Any]) -> str | None:
    """The cache salt among a first block's keys, "" when there is none; None when it holds more than
    text."""
    if not keys:
        return ""
    return keys[0] if len(keys) == 1 and isinstance(keys[0], str) else None
