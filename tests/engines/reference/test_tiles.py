"""Products in tiles: right, and independent of what else is in the batch."""

from __future__ import annotations

import numpy as np
import pytest

from penstock.engines.reference.tiles import TILE_ROWS, TiledMatrix, padded_rows, positions_agree, tiles

SHAPES = [(64, 96), (192, 1024), (512, 192), (1024, 300), (4096, 40), (10_000, 8)]


def product(matrix: TiledMatrix, rows: np.ndarray) -> np.ndarray:
    out = np.full((len(rows), matrix.padded_columns), np.nan, np.float32)
    np.matmul(tiles(rows), matrix.panels, out=matrix.split(out))
    return out[:, : matrix.columns]


@pytest.mark.parametrize(("inner", "columns"), SHAPES)
def test_products_are_right(inner: int, columns: int) -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((inner, columns), np.float32)
    rows = rng.standard_normal((3 * TILE_ROWS, inner), np.float32)
    expected = rows.astype(np.float64) @ weight.astype(np.float64)
    assert np.allclose(product(TiledMatrix(weight), rows), expected, rtol=0, atol=1e-6 * inner)


@pytest.mark.parametrize(("inner", "columns"), SHAPES)
def test_a_row_does_not_depend_on_its_place_or_neighbours(inner: int, columns: int) -> None:
    rng = np.random.default_rng(2)
    matrix = TiledMatrix(rng.standard_normal((inner, columns), np.float32))
    row = rng.standard_normal(inner, np.float32)
    results = []
    for place in range(4 * TILE_ROWS):
        rows = rng.standard_normal((padded_rows(place + 1), inner), np.float32)
        rows[place] = row
        results.append(product(matrix, rows)[place])
    assert all(np.array_equal(result, results[0]) for result in results)
    assert positions_agree(matrix)


def test_rows_are_padded_to_a_multiple_of_eight() -> None:
    assert [padded_rows(count) for count in (0, 1, 8, 9)] == [0, 8, 8, 16]
