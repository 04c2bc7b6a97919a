"""Matrix products whose rows do not depend on their neighbours.

A BLAS picks its kernel by the shape of the whole product, and kernels differ in the order in which they
add, so a row's last bits change with the number of rows beside it. A near tie between two tokens could
then fall one way when a prompt is computed at once, and the other way when it is computed in chunks,
after a prefix hit, or on another worker. So every product here is made of calls of one fixed shape:
`TILE_ROWS` rows (short batches are padded) by one panel of columns. Both OpenBLAS kernel families of
x86 give every row position of such a tile the same sums, which `positions_agree` checks at load.

Panels stay at the size up to which OpenBLAS uses one thread: several engines on a machine do not fight
for cores, and an engine's speed and sums do not depend on thread settings. At that size its AVX-512 kernels
also skip repacking the operands, so that tiles are nearly as fast there as one large product; with AVX2
kernels a long prefill's products take about 1.7 times as long.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

TILE_ROWS = 8
_MAX_TILE_PRODUCTS = 1 << 18  # rows x inner x columns of one BLAS call
_COLUMN_STEP = 16  # one AVX-512 register of float32


class TiledMatrix:
    """A weight matrix cut into panels of columns.

    Args:
        weight: shape (inner, columns).

    Attributes:
        panels: shape (panels, 1, inner, panel columns), the last panel padded with zeros.
        columns: as given.
        padded_columns: all panels together, the width that an output buffer needs.
    """

    def __init__(self, weight: Floats) -> None:
        inner, self.columns = weight.shape
        most = max(_COLUMN_STEP, _MAX_TILE_PRODUCTS // (TILE_ROWS * inner) // _COLUMN_STEP * _COLUMN_STEP)
        count = -(-self.columns // most)
        width = -(-self.columns // (count * _COLUMN_STEP)) * _COLUMN_STEP
        self.padded_columns = count * width
        padded = np.zeros((inner, self.padded_columns), np.float32)
        padded[:, : self.columns] = weight
        self.panels = np.ascontiguousarray(padded.reshape(inner, count, width).transpose(1, 0, 2))[:, None]

    def split(self, out: Floats) -> Floats:
        """A view of `out`, shape (rows, padded columns), as `np.matmul(tiles(x), panels, out=...)` writes
        it; rows are a multiple of TILE_ROWS."""
        count, _, _, width = self.panels.shape
        return out.reshape(-1, TILE_ROWS, count, width).transpose(2, 0, 1, 3)


def tiles(rows: Floats) -> Floats:
    """A view of (rows, inner) as (1, tiles, TILE_ROWS, inner); rows are a multiple of TILE_ROWS."""
    return rows.reshape(1, -1, TILE_ROWS, rows.shape[-1])


def padded_rows(count: int) -> int:
    """`count` rounded up to whole tiles."""
    return -(-count // TILE_ROWS) * TILE_ROWS


def positions_agree(matrix: TiledMatrix) -> bool:
    """Whether this BLAS gives equal rows equal results at every position of a tile, whatever the
    others hold."""
    inner = matrix.panels.shape[2]
    rng = np.random.default_rng(0)
    row = rng.standard_normal(inner, np.float32)
    results = []
    for position in range(TILE_ROWS):
        tile = rng.standard_normal((TILE_ROWS, inner), np.float32)
        tile[position] = row
        results.append((tiles(tile) @ matrix.panels[:1])[0, 0, position])
    return all(np.array_equal(result, results[0]) for result in results)
