"""The few workers of a large pool that can be the cheapest: the formulas of core/costs.py and
core/disagg.py, computed for all workers at once.

One call of `costs` takes 4 µs, so that a choice among a thousand workers would take milliseconds. Here the
loads lie in columns, and numpy computes each term for the whole pool in a few microseconds. What comes of
it is only a list of candidates: those few are then compared by the formulas themselves, as in a small pool
(core/policy.py). So every figure that a decision shows or keeps comes from core/costs.py. A test compares
what is chosen so with what comparing everybody chooses.

Only frontends with large pools import this module, and with it numpy.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from random import Random
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.core.costs import (
    GROWTH_SHARE,
    IDLE_SHARE,
    ITL_SPREAD,
    MISS_SHARE,
    OFF_OBJECTIVE,
    OUTPUT_SHARE,
    STEP_TOKENS,
    Query,
)
from penstock.core.disagg import Disagg
from penstock.core.pairing import KvFormat, kv_format
from penstock.core.prompt_work import PromptWork
from penstock.core.worker_load import WorkerLoad
from penstock.shapes import Card, Role

KEPT = 8
"""Candidates of each kind: as many as a decision record keeps. One would do, but for a rounding error."""

Column = NDArray[np.float64]
Mask = NDArray[np.bool_]
Indices = NDArray[np.intp]

_ROLES = {Role.PREFILL: 0.0, Role.DECODE: 1.0, Role.AGGREGATED: 2.0}
_PREFILL, _DECODE = _ROLES[Role.PREFILL], _ROLES[Role.DECODE]


class _Pool(NamedTuple):
    """One array for each figure, with an element for each worker. Names as in Load, Rates and Candidate."""

    running: Column
    waiting: Column
    prefill_tokens: Column
    used_blocks: Column
    total_blocks: Column
    context_tokens: Column
    held_handoffs: Column
    prefill_context_tokens: Column
    step_ms: Column
    prefill_token_ms: Column
    decode_request_ms: Column
    transfer_ms: Column
    transfer_block_ms: Column
    prefill_context_ms: Column
    decode_context_ms: Column
    mean_prompt_tokens: Column
    mean_prompt_context_tokens: Column
    mean_output_tokens: Column
    step_began_at: Column
    step_tokens: Column  # of prompts, that the step under way computes
    step_context_tokens: Column
    block_size: Column
    max_running: Column
    role: Column
    kv_format: Column

    def compute_ms(self, tokens: Column | float, context_tokens: Column | float) -> Column:
        return self.prefill_token_ms * tokens + self.prefill_context_ms * context_tokens

    def decode_step_ms(self, requests: Column, context_tokens: Column) -> Column:
        return self.step_ms + self.decode_request_ms * requests + self.decode_context_ms * context_tokens


class _Costs(NamedTuple):
    """The terms of core/costs.py, likewise."""

    uncached_tokens: Column
    queue_ms: Column
    prefill_ms: Column
    inflicted_ms: Column
    transfer_ms: Column
    later_ms: Column | float  # what does not depend on who computes the prompt


_LOAD = struct.Struct("21d")
_CARD = struct.Struct("4d")
_ROW = struct.Struct(f"{len(_Pool._fields)}d")


class Few(NamedTuple):
    """Who may be chosen, and how many that decode were compared with them."""

    cards: list[Card]
    decoders: int


class CostColumns:
    """The figures of all connected workers. A list of cards that is passed in must not change later."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._free: list[int] = []
        self._buffer = bytearray()
        self._formats: dict[KvFormat, float] = {}
        self._cards: Sequence[Card] = ()  # those of the latest choice
        self._rows_of_cards: Indices
        self._places: Indices  # by row: its place among these cards
        self._block_sizes: set[int] = set()
        self._columns: NDArray[np.float64]  # of these cards: a row for each figure
        self._changed: set[int] = set()  # rows of the buffer that `_columns` has as they were

    def add(self, card: Card) -> None:
        """A worker is connected; `put` must follow."""
        row = self._rows.get(card.instance_id)
        if row is None:
            row = self._free.pop() if self._free else len(self._rows)
            self._rows[card.instance_id] = row
        if len(self._buffer) < (row + 1) * _ROW.size:
            self._buffer += bytes(max(64 * _ROW.size, len(self._buffer)))
        engine = card.engine
        number = self._formats.setdefault(kv_format(engine), float(len(self._formats)))
        offset = row * _ROW.size + _LOAD.size
        _CARD.pack_into(
            self._buffer, offset, engine.block_size, engine.max_running, _ROLES[card.role], number
        )
        self._cards = ()

    def remove(self, instance_id: str) -> None:
        """A worker is gone. Unknown ones are ignored."""
        row = self._rows.pop(instance_id, None)
        if row is not None:
            self._free.append(row)
            self._cards = ()

    def put(self, instance_id: str, worker: WorkerLoad, computed: PromptWork) -> None:
        """What a worker is assumed to have to do, of which its step under way computes so much."""
        load, row = worker.assumed(), self._rows[instance_id]
        rates = load.rates
        self._changed.add(row)
        _LOAD.pack_into(
            self._buffer,
            row * _ROW.size,
            load.running,
            load.waiting,
            load.prefill_tokens,
            load.used_blocks,
            load.total_blocks,
            load.context_tokens,
            load.held_handoffs,
            load.prefill_context_tokens,
            rates.step_ms,
            rates.prefill_token_ms,
            rates.decode_request_ms,
            rates.transfer_ms,
            rates.transfer_block_ms,
            rates.prefill_context_ms,
            rates.decode_context_ms,
            worker.prompt_tokens,
            worker.prompt_context_tokens,
            worker.output_length,
            worker.step_began_at if worker.requests else -math.inf,
            *computed,
        )

    def block_sizes(self, cards: Sequence[Card]) -> set[int]:
        """Of these workers."""
        self._look_up(cards)
        return self._block_sizes

    def few(
        self,
        query: Query,
        cards: Sequence[Card],
        overlaps: Mapping[str, int],
        also: str,
        disagg: Disagg,
        rng: Random,
        now: float,
    ) -> Few:
        """Those of `cards` that a choice among all of them by their costs could take, with those that could
        begin first, in the order of `cards`.

        Args:
            overlaps: how many of the prompt's blocks each worker has; those that are not in it, none.
            also: a worker to include, if it is one of them.
        """
        self._look_up(cards)
        pool = self._pool()
        by_row = np.zeros(len(self._places))
        held = [(row, overlaps[name]) for name in overlaps if (row := self._rows.get(name)) is not None]
        if held:  # others are not connected yet: their snapshots have only begun to come
            rows, blocks = zip(*held, strict=True)
            by_row[list(rows)] = blocks
        handed = self._formats.get(query.handed, -1.0) if query.handed is not None else None
        kept, decoders = _few(query, pool, by_row[self._rows_of_cards], handed, disagg, rng, now)
        if kept and also in self._rows:
            kept.add(int(self._places[self._rows[also]]))
        return Few([cards[place] for place in sorted(kept) if place >= 0], decoders)

    def _look_up(self, cards: Sequence[Card]) -> None:
        if cards is self._cards:
            return
        rows = np.array([self._rows[card.instance_id] for card in cards], np.intp)
        self._places = np.full(len(self._buffer) // _ROW.size, -1, np.intp)
        self._places[rows] = np.arange(len(cards))
        self._rows_of_cards, self._cards = rows, cards
        self._block_sizes = {card.engine.block_size for card in cards}
        self._columns = np.ascontiguousarray(self._table()[rows].T)
        self._changed.clear()

    def _pool(self) -> _Pool:
        if self._changed:
            rows = np.fromiter(self._changed, np.intp, len(self._changed))
            places = self._places[rows]
            if (places < 0).any():  # some are of other cards
                rows, places = rows[places >= 0], places[places >= 0]
            self._columns[:, places] = self._table()[rows].T
            self._changed.clear()
        return _Pool(*self._columns)

    def _table(self) -> NDArray[np.float64]:
        return np.frombuffer(self._buffer).reshape(-1, len(_Pool._fields))


def _few(
    query: Query,
    pool: _Pool,
    overlap: Column,
    handed: float | None,
    disagg: Disagg,
    rng: Random,
    now: float,
) -> tuple[set[int], int]:
    """The places of those to compare, none when nobody decodes, and how many of the whole pool that decode
    would be compared. As `choose` of core/policy.py."""
    decoders = pool.role != _PREFILL
    if not decoders.any():
        return set(), 0
    here = _costs(query, pool, overlap, now)
    kept = {_first_least(here.queue_ms, decoders)}
    takers = decoders & (pool.kv_format == handed) if handed is not None else np.zeros_like(decoders)
    if takers.any():
        total_ms = here.queue_ms + here.transfer_ms + here.later_ms
        return kept | _least(total_ms, takers, rng), int(takers.sum())
    start_ms = alone_ms = here.queue_ms + here.prefill_ms + here.inflicted_ms
    for each in _kinds(pool.kv_format[decoders]):
        same = pool.kv_format == each
        prefills = ~decoders & same
        if disagg is not Disagg.NEVER and prefills.any():
            ready_ms = here.queue_ms + here.prefill_ms
            kept |= {_first_least(here.queue_ms, prefills)} | _least(ready_ms, prefills, rng)
            remote_ms = np.maximum(ready_ms[prefills].min(), here.queue_ms) + here.transfer_ms
            if here.queue_ms[prefills].min() >= here.queue_ms[decoders].min():
                prefill_ms = here.prefill_ms[_first_least(ready_ms, prefills)]
                remote_ms += query.waiting_for_prefill * prefill_ms
            else:
                delayed_ms = query.waiting_for_decode * here.prefill_ms
                start_ms = np.where(same, alone_ms + delayed_ms, start_ms)
            takes = same & (pool.role == _DECODE)
            if disagg is Disagg.AUTO:
                takes &= (here.uncached_tokens >= pool.block_size) & (remote_ms < start_ms)
            start_ms = np.where(takes, remote_ms, start_ms)
        kept |= _least(start_ms + here.later_ms, decoders & same, rng)
    return kept, int(decoders.sum())


def _kinds(column: Column) -> set[float]:
    """The different values of a column that has at least one."""
    return {float(column[0])} if (column == column[0]).all() else set(column.tolist())


def _first_least(column: Column, mask: Mask) -> int:
    """The place of the least element among the masked ones; the first of several."""
    return int(np.where(mask, column, np.inf).argmin())


def _least(column: Column, mask: Mask, rng: Random) -> set[int]:
    """The places of the KEPT least elements among the masked ones; of more that are equally the least, some
    at random."""
    places = np.flatnonzero(mask)
    if len(places) <= KEPT:
        return set(places.tolist())
    values = column[places]
    least = places[values == values.min()]
    if len(least) > KEPT:
        return set(rng.sample(least.tolist(), KEPT))
    return set(places[values.argpartition(KEPT)[:KEPT]].tolist())


def _costs(query: Query, pool: _Pool, overlap: Column, now: float) -> _Costs:
    prompt, output = query.prompt_tokens, query.expected_output_tokens
    requests = pool.running + pool.waiting
    uncached = np.maximum(1.0, prompt - overlap * pool.block_size)
    missing = np.maximum(0.0, np.ceil(prompt / pool.block_size) - overlap)
    step_ms = pool.decode_step_ms(requests, pool.context_tokens)
    prompt_ms = pool.compute_ms(uncached, np.floor(uncached * (2 * prompt - uncached) / 2))
    blocked_ms = _blocked_ms(query, pool, missing)
    idle_share = np.where(pool.role == _DECODE, IDLE_SHARE, 0.0)
    return _Costs(
        uncached_tokens=uncached,
        queue_ms=_queued_ms(pool, uncached, step_ms, now) + blocked_ms,
        prefill_ms=prompt_ms + np.ceil(uncached / STEP_TOKENS) * step_ms,
        inflicted_ms=np.maximum(OUTPUT_SHARE * (requests + 1), idle_share) * prompt_ms,
        transfer_ms=pool.transfer_ms + pool.transfer_block_ms * missing,
        later_ms=OUTPUT_SHARE
        * output
        * pool.decode_step_ms(requests + 1, pool.context_tokens + prompt + output / 2)
        + _missed_ms(query, pool),
    )


def _queued_ms(pool: _Pool, uncached: Column, step_ms: Column, now: float) -> Column:
    step_prompts_ms = pool.compute_ms(pool.step_tokens, pool.step_context_tokens)
    under_way_ms = np.maximum(0.0, step_ms + step_prompts_ms - (now - pool.step_began_at) * 1e3)
    left = pool.prefill_tokens - pool.step_tokens
    left_ms = pool.compute_ms(left, pool.prefill_context_tokens - pool.step_context_tokens)
    more_steps = np.ceil((left + uncached) / STEP_TOKENS) - np.ceil(uncached / STEP_TOKENS)
    return under_way_ms + left_ms + more_steps * step_ms


def _blocked_ms(query: Query, pool: _Pool, needed_blocks: Column) -> Column | float:
    stay_tokens = _stay_tokens(query, pool)
    ahead = np.maximum(0.0, pool.running + pool.waiting + 1 - pool.max_running)
    ahead[pool.max_running == 0] = 0.0
    growth = np.floor(GROWTH_SHARE * stay_tokens * pool.running / pool.block_size)
    growth[pool.role == _PREFILL] = 0.0
    short = (pool.total_blocks > 0) & (pool.total_blocks - pool.used_blocks - growth < needed_blocks)
    ahead = np.where(short, np.maximum(ahead, pool.waiting + 1), ahead)
    if not ahead.any():
        return 0.0
    stay_ms = stay_tokens * pool.decode_step_ms(pool.running, pool.context_tokens)
    stay_ms += pool.running * pool.compute_ms(pool.mean_prompt_tokens, pool.mean_prompt_context_tokens)
    pull_ms = pool.transfer_ms + pool.transfer_block_ms * needed_blocks
    stay_ms = np.where(pool.role == _PREFILL, pull_ms, stay_ms)
    return ahead * stay_ms / np.maximum(1.0, pool.running + pool.held_handoffs)


def _stay_tokens(query: Query, pool: _Pool) -> Column:
    known = pool.mean_output_tokens
    return np.maximum(1.0, np.where(known == 0, query.expected_output_tokens, known))


def _missed_ms(query: Query, pool: _Pool) -> Column | float:
    if not query.slo_itl_ms:
        return 0.0
    now = pool.running + pool.waiting
    prompt_ms = pool.compute_ms(pool.mean_prompt_tokens, pool.mean_prompt_context_tokens)
    stall_ms = prompt_ms / _stay_tokens(query, pool)

    def kept(more: int) -> Column:
        context_tokens = pool.context_tokens + more * query.prompt_tokens
        itl_ms = (
            pool.decode_step_ms(now + more, context_tokens) + np.maximum(0.0, now + more - 1) * stall_ms
        )
        off = (itl_ms / query.slo_itl_ms - 1) / ITL_SPREAD
        return 1 / (1 + np.exp(np.minimum(off, OFF_OBJECTIVE)))

    then = kept(1)
    miss_ms = MISS_SHARE * pool.compute_ms(*query.usual_prompt)
    return miss_ms * (now * (kept(0) - then) + 1 - then)
