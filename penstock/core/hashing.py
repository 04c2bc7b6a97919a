"""Block hashes: how a prompt is named, block by block, so that routers and workers can compare.

    sequence_hash(i) = xxh3_64(tokens(i), seed=sequence_hash(i - 1))

`tokens(i)` is the i-th block's token ids as little-endian uint32; the seed of block 0 is `root_hash`, so
equal tokens under another model, adapter or cache salt never meet. A sequence hash thus names a whole
prefix: a worker that has block i of this hash and its parents has KV for (i + 1) * block_size tokens.

8 bytes are a hint for routing. Nothing that decides about correctness may rest on them alone: the block
pool compares tokens, and a handoff is checked against more than its hash.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from functools import lru_cache
from struct import iter_unpack

from xxhash import xxh3_64_intdigest

TOKEN_BYTES = 4


def root_hash(model: str, cache_salt: str = "", lora: str = "") -> int:
    """The seed of block 0. Parts are length-prefixed, so ("ab", "c") and ("a", "bc") differ."""
    return _root_hash(model, cache_salt, lora) if cache_salt or lora else _model_root(model)


@lru_cache(maxsize=64)
def _model_root(model: str) -> int:
    """Of nearly all prompts, and the same for all of a model."""
    return _root_hash(model, "", "")


def _root_hash(model: str, cache_salt: str, lora: str) -> int:
    parts = (part.encode() for part in (model, cache_salt, lora))
    return xxh3_64_intdigest(b"".join(len(part).to_bytes(4, "little") + part for part in parts))


def sequence_hashes(token_ids: Sequence[int], block_size: int, root: int) -> list[int]:
    """The hashes of all whole blocks of `token_ids`, first to last."""
    data = token_bytes(token_ids)
    width = block_size * TOKEN_BYTES
    blocks = iter_unpack(f"{width}s", memoryview(data)[: len(data) // width * width])
    parent = root
    return [parent := xxh3_64_intdigest(block, parent) for (block,) in blocks]


def block_hash(token_ids: Sequence[int], parent: int) -> int:
    """The hash of one block (whole or partial) that follows `parent`."""
    return packed_block_hash(token_bytes(token_ids), parent)


def packed_block_hash(tokens: bytes, parent: int) -> int:
    """`block_hash` of what `token_bytes` made of its tokens."""
    return xxh3_64_intdigest(tokens, parent)


def last_hash(token_ids: Sequence[int], block_size: int, root: int) -> int:
    """The hash of the last block of `token_ids`, be it whole or partial; `root` for no tokens."""
    tail = len(token_ids) % block_size
    hashes = sequence_hashes(token_ids, block_size, root)
    parent = hashes[-1] if hashes else root
    return block_hash(token_ids[len(token_ids) - tail :], parent) if tail else parent


def token_bytes(token_ids: Sequence[int]) -> bytes:
    """Token ids, each in TOKEN_BYTES, as they are hashed. Raises OverflowError for what is no uint32."""
    packed = array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()
