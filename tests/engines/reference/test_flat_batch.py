"""Flattening batches: every token once, every query's keys in its window."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from penstock.engines.batch import BatchRow, Sequence
from penstock.engines.reference.flat_batch import Cut, flatten
from penstock.shapes import Sampling

GREEDY = Sampling(max_tokens=1, temperature=0.0)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[BatchRow], int]:
    size = draw(st.sampled_from([1, 4, 16, 48, 128]))
    rows = []
    for number in range(draw(st.integers(1, 12))):
        length = draw(st.integers(1, 300))
        start = draw(st.integers(0, length - 1))
        count = draw(st.sampled_from([1, length - start, draw(st.integers(1, length - start))]))
        blocks = -(-length // size) + draw(st.integers(0, 2))
        block_ids = [number * 1000 + at for at in range(blocks)]
        token_ids = [number * 1000 + at for at in range(length)]
        sequence = Sequence(str(number), token_ids, length, GREEDY, block_ids)
        rows.append(BatchRow(sequence, start, count, draw(st.booleans()) and start + count == length))
    return rows, size


@given(batches())
def test_every_query_sees_its_own_keys_and_a_width_of_its_own(case: tuple[list[BatchRow], int]) -> None:
    rows, size = case
    cut = Cut(size, kv_width=64, heads=6)
    flat, span = flatten(rows, cut), cut.span
    assert span % size == 0
    seen = np.zeros(flat.count, int)
    for window in flat.windows:
        for tile in window.tiles:
            seen[tile.first : tile.stop] += 1
            for query in range(tile.first, tile.stop):
                position = int(flat.positions[query])
                assert tile.width == (position // span + 1) * span
                assert tile.offsets[query - tile.first] == position % span
                sequence = query - tile.first if len(window.block_ids) > 1 else 0
                blocks = window.block_ids[sequence]
                owner = int(flat.token_ids[query]) // 1000
                assert len(blocks) * size >= tile.width
                written = position // size + 1
                assert blocks[:written].tolist() == [owner * 1000 + at for at in range(written)]
                assert set(blocks // 1000) == {owner}, "a stranger's block"
                assert flat.block_ids[query] == blocks[position // size]
    assert (seen == 1).all()
    assert sorted(flat.token_ids[: flat.count].tolist()) == sorted(
        token for row in rows for token in row.sequence.token_ids[row.start : row.start + row.count]
    )
    assert [int(flat.token_ids[at]) for at in flat.last] == [
        row.sequence.token_ids[-1] for row in rows if row.sample
    ]


@given(batches())
def test_blocks_that_stay_partial_are_cleared_when_first_written(case: tuple[list[BatchRow], int]) -> None:
    rows, size = case
    expected = []
    for row in rows:
        end = row.start + row.count
        first_of_tail = end // size * size
        if end % size and first_of_tail >= row.start:
            expected.append(row.sequence.block_ids[first_of_tail // size])
    assert flatten(rows, Cut(size, 64, 6)).fresh_blocks == expected
