"""A batch of rows as flat arrays: one entry per token, grouped by what attention reads for them.

A query at position p attends to p + 1 keys. Rounding that up to a multiple of `span` keys gives products
whose shape depends on the query's own position only, never on the batch: the other half (beside
`tiles`) of results that do not depend on what else is computed. Queries of one such width read a *window*
of keys together; those that decode bring a block list each, those of one prefill share one.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from penstock.engines.batch import BatchRow
from penstock.engines.reference.kv import Integers
from penstock.engines.reference.tiles import padded_rows

_SPAN_TOKENS = 64  # at most so many keys per query are computed in vain
_CACHED_FLOATS = 1 << 18  # 1 MiB of keys, and as much of values, or of scores, stays in a core's cache


@dataclass(frozen=True, slots=True)
class Cut:
    """How a batch is cut for attention. None of it changes results, but `span`.

    Args:
        block_size: tokens per block.
        kv_width: floats of one token's key (or value), all heads.
        heads: query heads.
    """

    block_size: int
    kv_width: int
    heads: int

    @property
    def span(self) -> int:
        """By how many keys windows grow: whole blocks, so that none is read in part."""
        return max(1, _SPAN_TOKENS // self.block_size) * self.block_size

    def sequences_at_once(self, width: int) -> int:
        """Decoding sequences to gather at a time."""
        return max(1, _CACHED_FLOATS // (width * self.kv_width))

    def queries_at_once(self, width: int) -> int:
        """Queries of a prefill to compute at a time."""
        return max(1, _CACHED_FLOATS // (width * self.heads))


@dataclass(frozen=True, slots=True)
class QueryTile:
    """Tokens `first` to `stop` of the flat batch; each sees the first keys of its window's `width`.

    `offsets`, shape (tokens,), are the queries' positions within the window's last span.
    """

    first: int
    stop: int
    width: int
    offsets: Integers


@dataclass(frozen=True, slots=True)
class Window:
    """Blocks to gather, shape (sequences, blocks), and the queries that read them: one per sequence, or
    any number of one sequence."""

    block_ids: Integers
    tiles: list[QueryTile]


@dataclass(slots=True)
class FlatBatch:
    """Tokens of all rows; padded to whole tiles of tokens, `count` of them real.

    `last[i]` is the index of the last token of the i-th row that samples. `scored` has the rows that give
    log-probabilities of their prompt, each with the index of its first token. `fresh_blocks` are blocks
    that get their first token in this batch without being filled by it.
    """

    count: int
    token_ids: Integers
    positions: Integers
    block_ids: Integers  # of each token
    windows: list[Window] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    scored: list[tuple[BatchRow, int]] = field(default_factory=list)
    fresh_blocks: list[int] = field(default_factory=list)


def flatten(batch: list[BatchRow], cut: Cut) -> FlatBatch:
    """Lay out a batch: decoding rows first, by window width, then each prefill."""
    span, block_size = cut.span, cut.block_size
    decodes: dict[int, list[BatchRow]] = defaultdict(list)
    prefills: list[BatchRow] = []
    for row in batch:
        if row.count == 1:
            decodes[row.start // span].append(row)
        else:
            prefills.append(row)
    ordered = [row for rows in decodes.values() for row in rows] + prefills
    flat = _tokens(ordered, block_size)
    first = 0
    for spans, rows in decodes.items():
        width = (spans + 1) * span
        step = cut.sequences_at_once(width)
        for group in (rows[at : at + step] for at in range(0, len(rows), step)):
            flat.windows.append(_decode_window(group, first, width, cut))
            first += len(group)
    for row in prefills:
        flat.windows.append(_prefill_window(row, first, cut))
        first += row.count
    ends = np.cumsum([row.count for row in ordered]).tolist()
    last = {id(row): end - 1 for row, end in zip(ordered, ends, strict=True)}
    flat.last = [last[id(row)] for row in batch if row.sample]
    flat.scored = [
        (row, last[id(row)] + 1 - row.count) for row in batch if row.sequence.prompt_logprobs is not None
    ]
    flat.fresh_blocks = [
        row.sequence.block_ids[end // block_size]
        for row, end in ((row, row.start + row.count) for row in batch)
        if end % block_size and row.start <= end - end % block_size
    ]
    return flat


def _tokens(rows: list[BatchRow], block_size: int) -> FlatBatch:
    token_ids: list[int] = []
    positions: list[int] = []
    block_ids: list[int] = []
    for row in rows:
        sequence, start, stop = row.sequence, row.start, row.start + row.count
        if row.count == 1:
            token_ids.append(sequence.token_ids[start])
            positions.append(start)
            block_ids.append(sequence.block_ids[start // block_size])
        else:
            token_ids += sequence.token_ids[start:stop]
            positions += range(start, stop)
            block_ids += [sequence.block_ids[at // block_size] for at in range(start, stop)]
    count = len(token_ids)
    padding = [0] * (padded_rows(count) - count)
    return FlatBatch(
        count, np.array(token_ids + padding), np.array(positions + padding), np.array(block_ids)
    )


def _window_blocks(row: BatchRow, width: int, block_size: int) -> list[int]:
    """The row's blocks that hold tokens; the first one fills up the window, never a stranger's."""
    block_ids = row.sequence.block_ids[: -(-(row.start + row.count) // block_size)]
    return block_ids + block_ids[:1] * (width // block_size - len(block_ids))


def _decode_window(rows: list[BatchRow], first: int, width: int, cut: Cut) -> Window:
    block_ids = np.array([_window_blocks(row, width, cut.block_size) for row in rows])
    offsets = np.array([row.start % cut.span for row in rows])
    return Window(block_ids, [QueryTile(first, first + len(rows), width, offsets)])


def _prefill_window(row: BatchRow, first: int, cut: Cut) -> Window:
    span, end = cut.span, row.start + row.count
    widest = -(-end // span) * span
    tiles = []
    position = row.start
    while position < end:
        width = (position // span + 1) * span
        stop = min(end, width, position + cut.queries_at_once(width))
        at = first + position - row.start
        offsets = np.arange(position, stop) % span
        tiles.append(QueryTile(at, at + stop - position, width, offsets))
        position = stop
    return Window(np.array([_window_blocks(row, widest, cut.block_size)]), tiles)
