"""The KV pool's layout, which transfers rely on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from penstock.engines.reference.kv import KvPool, block_bytes
from penstock.engines.reference.model_config import read_config


def test_a_block_is_one_row_of_bytes(checkpoint: Path) -> None:
    config = read_config(checkpoint)
    pool = KvPool(config, total_blocks=6, block_size=4)
    raw = pool.raw()
    assert (raw.shape, raw.format, raw.c_contiguous, raw.readonly) == (
        (6, block_bytes(config, 4)),
        "B",
        True,
        False,
    )
    rows = np.asarray(raw)
    pool.array[2] = 1.5
    assert np.array_equal(rows[2], np.full(len(rows[2]) // 4, 1.5, np.float32).view(np.uint8))
    assert not rows[[0, 1, 3, 4, 5]].any()
    rows[4] = rows[2]
    assert (pool.array[4] == 1.5).all()


def test_what_is_written_is_gathered(checkpoint: Path) -> None:
    config = read_config(checkpoint)
    pool = KvPool(config, total_blocks=6, block_size=4)
    width = config.kv_heads * config.head_dim
    key_values = np.random.default_rng(0).standard_normal((6, 2, width), np.float32)
    blocks, positions = np.array([5, 5, 5, 5, 1, 1]), np.arange(6)
    pool.write(2, pool.slots(blocks, positions), key_values)
    keys, values = np.empty((2, 4 * width), np.float32), np.empty((2, 4 * width), np.float32)
    pool.gather(2, np.array([5, 1]), keys, values)
    assert np.array_equal(keys.reshape(8, width)[:6], key_values[:, 0])
    assert np.array_equal(values.reshape(8, width)[:6], key_values[:, 1])
    assert not pool.array[:, [0, 1]].any()
    pool.clear([5])
    assert not pool.array[5].any()
    assert pool.array[1].any()
