"""The paged KV pool: one array, one row per block."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from penstock.engines.reference.model_config import ModelConfig
from penstock.engines.reference.tiles import Floats

Integers = NDArray[np.int64]

_FLOAT_BYTES = 4


def block_bytes(config: ModelConfig, block_size: int) -> int:
    """Bytes of one block's keys and values over all layers."""
    return config.layers * 2 * block_size * config.kv_heads * config.head_dim * _FLOAT_BYTES


class KvPool:
    """Keys and values of all blocks.

    The array has shape (total_blocks, layers, 2, block_size, kv_heads, head_dim), C-contiguous: a block
    is one range of bytes, which a transfer moves as it is. The operating system hands out its pages
    when they are first written.

    Invariant: slots of a block behind the last written one are zero. They are read (a window's width is
    rounded up), and count with weight zero; a NaN left there by a former owner would count all the same.
    """

    def __init__(self, config: ModelConfig, total_blocks: int, block_size: int) -> None:
        self.total_blocks = total_blocks
        self.block_size = block_size
        self._layers = config.layers
        width = config.kv_heads * config.head_dim
        self.array = np.zeros(
            (total_blocks, config.layers, 2, block_size, config.kv_heads, config.head_dim), np.float32
        )
        self._slots = self.array.reshape(-1, width)
        self._pages = self.array.reshape(-1, block_size * width)
        self._key_value: Integers = np.array([0, block_size])

    def raw(self) -> memoryview:
        """The pool as writable bytes, shape (total_blocks, bytes per block)."""
        return self.array.reshape(self.total_blocks, -1).view(np.uint8).data

    def clear(self, block_ids: list[int]) -> None:
        """Zero whole blocks."""
        self.array[block_ids] = 0.0

    def slots(self, block_ids: Integers, positions: Integers) -> Integers:
        """Where layer 0 keeps the key and the value of each token, shape (tokens, 2)."""
        slots: Integers = block_ids * (self._layers * 2 * self.block_size) + positions % self.block_size
        return slots[:, None] + self._key_value

    def write(self, layer: int, slots: Integers, key_values: Floats) -> None:
        """Store the tokens' keys and values, shape (tokens, 2, kv_heads * head_dim), for a layer."""
        self._slots[slots + layer * 2 * self.block_size] = key_values

    def gather(self, layer: int, block_ids: Integers, keys: Floats, values: Floats) -> None:
        """Copy blocks out, each into a row of block_size * kv_heads * head_dim floats.

        Args:
            block_ids: shape (blocks,).
            keys, values: shape (blocks, block_size * kv_heads * head_dim), written.
        """
        pages = block_ids * (2 * self._layers) + 2 * layer
        # With mode="raise", take would write to a temporary array first.
        np.take(self._pages, pages, axis=0, out=keys, mode="clip")
        pages += 1
        np.take(self._pages, pages, axis=0, out=values, mode="clip")
