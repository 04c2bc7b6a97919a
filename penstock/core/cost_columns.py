"""The few workers of a large pool that can be the cheapest: the formulas of core/costs.py and
core/disagg.py, computed for all workers at once.

One call of `costs` takes 4 µs, so that a choice among a thousand workers would take milliseconds. Here the
loads lie in columns, and numpy computes each term for the whole pool in a few microseconds. What comes of
it is only a list of candidates: those few are then compared by the formulas themselves, as in a small pool
(core/policy.py). So every figure that a decision shows or keeps comes from core/costs.py. A test compares
what is chosen so with what comparing everybody chooses.

Most of the time goes into calling numpy, not into its work, so calls are saved: what the load alone decides
is computed when the load is put in, and workers of one role with KV of one format lie side by side, so that
no mask picks them out and their role and block size are plain numbers.

Only frontends with large pools import this module, and with it numpy.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from itertools import groupby
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
Indices = NDArray[np.intp]

_ROLES = (Role.PREFILL, Role.DECODE, Role.AGGREGATED)


class _Group(NamedTuple):
    """Workers of one role with KV of one format, and where they lie in the columns."""

    kv_format: KvFormat
    role: Role
    span: slice


class _Pool(NamedTuple):
    """One array for each figure, with an element for each worker. Names as in Load, Rates and Candidate."""

    running: Column
    requests: Column
    free_blocks: Column
    held_handoffs: Column
    prefill_token_ms: Column
    decode_request_ms: Column
    transfer_ms: Column
    transfer_block_ms: Column
    prefill_context_ms: Column
    decode_context_ms: Column
    decode_ms: Column  # a step as it is now, without prompts
    usual_prompt_ms: Column  # to compute what a request brings there, on average
    output_tokens: Column  # of a request there, on average; 0: not known
    step_ms: Column  # the step under way, all of it
    step_began_at: Column
    left_tokens: Column  # of prompts, that this step leaves to those after it
    left_ms: Column  # to compute them
    max_running: Column

    def compute_ms(self, tokens: Column | float, context_tokens: Column | float) -> Column:
        return self.prefill_token_ms * tokens + self.prefill_context_ms * context_tokens

    def more_ms(self, context_tokens: float) -> Column:
        """By how much one request more, of so many tokens, makes a step longer."""
        return self.decode_request_ms + self.decode_context_ms * context_tokens


class _Members(NamedTuple):
    """A group, and what a choice needs of it."""

    group: _Group
    pool: _Pool
    overlap: Column  # in blocks
    places: Indices  # of the workers in the list of cards


class _Costs(NamedTuple):
    """The terms of core/costs.py, likewise."""

    uncached_tokens: Column
    queue_ms: Column
    prefill_ms: Column
    transfer_ms: Column
    inflicted_ms: Column | float  # this and the next one: 0 for prefill workers
    later_ms: Column | float  # what does not depend on who computes the prompt

    @property
    def ready_ms(self) -> Column:
        return self.queue_ms + self.prefill_ms


_LOAD = struct.Struct(f"{len(_Pool._fields) - 1}d")
_ROW = struct.Struct(f"{len(_Pool._fields)}d")
_MAX_RUNNING = struct.Struct("d")


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
        self._cards: Sequence[Card] = ()  # those of the latest choice
        self._order: Indices  # of these cards, group after group
        self._rows_in_order: Indices
        self._groups: list[_Group] = []
        self._places: Indices  # by row: its place in this order
        self._block_sizes: set[int] = set()
        self._columns: NDArray[np.float64]  # in this order: a row for each figure
        self._changed: set[int] = set()  # rows of the buffer that `_columns` has as they were

    def add(self, card: Card) -> None:
        """A worker is connected; `put` must follow."""
        row = self._rows.get(card.instance_id)
        if row is None:
            row = self._free.pop() if self._free else len(self._rows)
            self._rows[card.instance_id] = row
        if len(self._buffer) < (row + 1) * _ROW.size:
            self._buffer += bytes(max(64 * _ROW.size, len(self._buffer)))
        most = card.engine.max_running or math.inf
        _MAX_RUNNING.pack_into(self._buffer, row * _ROW.size + _LOAD.size, most)
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
        rates, requests, length = load.rates, load.running + load.waiting, worker.output_length
        # As in core/costs.py, but without calls: this runs for each report of each worker.
        token_ms, context_ms = rates.prefill_token_ms, rates.prefill_context_ms
        request_ms, decode_context_ms = rates.decode_request_ms, rates.decode_context_ms
        decode_ms = rates.step_ms + request_ms * requests + decode_context_ms * load.context_tokens
        tokens, context_tokens = computed
        left_tokens = load.prefill_tokens - tokens
        left_context_tokens = load.prefill_context_tokens - context_tokens
        self._changed.add(row)
        _LOAD.pack_into(
            self._buffer,
            row * _ROW.size,
            load.running,
            requests,
            load.total_blocks - load.used_blocks if load.total_blocks else math.inf,
            load.held_handoffs,
            token_ms,
            request_ms,
            rates.transfer_ms,
            rates.transfer_block_ms,
            context_ms,
            decode_context_ms,
            decode_ms,
            token_ms * worker.prompt_tokens + context_ms * worker.prompt_context_tokens,
            1.0 if 0.0 < length < 1.0 else length,
            decode_ms + token_ms * tokens + context_ms * context_tokens,
            worker.step_began_at if worker.requests else -math.inf,
            left_tokens,
            token_ms * left_tokens + context_ms * left_context_tokens,
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
        by_row = np.zeros(len(self._places))
        # Those without a row are not connected yet: their snapshots have only begun to come.
        rows = np.fromiter((self._rows.get(name, -1) for name in overlaps), np.intp, len(overlaps))
        blocks = np.fromiter(overlaps.values(), float, len(overlaps))
        by_row[rows[rows >= 0]] = blocks[rows >= 0]
        kept, decoders = _few(query, self._members(by_row[self._rows_in_order]), disagg, rng, now)
        if kept and also in self._rows and (place := self._places[self._rows[also]]) >= 0:
            kept.add(int(self._order[place]))
        return Few([cards[place] for place in sorted(kept)], decoders)

    def _look_up(self, cards: Sequence[Card]) -> None:
        if cards is self._cards:
            return
        kinds = [(kv_format(card.engine), _ROLES.index(card.role)) for card in cards]
        order = sorted(range(len(cards)), key=kinds.__getitem__)
        rows = np.array([self._rows[cards[place].instance_id] for place in order], np.intp)
        self._places = np.full(len(self._buffer) // _ROW.size, -1, np.intp)
        self._places[rows] = np.arange(len(cards))
        self._rows_in_order, self._order, self._cards = rows, np.array(order, np.intp), cards
        self._groups, start = [], 0
        for (kv, role), alike in groupby(kinds[place] for place in order):
            end = start + len(list(alike))
            self._groups.append(_Group(kv, _ROLES[role], slice(start, end)))
            start = end
        self._block_sizes = {card.engine.block_size for card in cards}
        self._columns = np.ascontiguousarray(self._table()[rows].T)
        self._changed.clear()

    def _members(self, overlap: Column) -> list[_Members]:
        """What is known of each group. `overlap`: in the same order as the columns."""
        if self._changed:
            rows = np.fromiter(self._changed, np.intp, len(self._changed))
            places = self._places[rows]
            if (places < 0).any():  # some are of other cards
                rows, places = rows[places >= 0], places[places >= 0]
            self._columns[:, places] = self._table()[rows].T
            self._changed.clear()
        return [
            _Members(
                group, _Pool(*self._columns[:, group.span]), overlap[group.span], self._order[group.span]
            )
            for group in self._groups
        ]

    def _table(self) -> NDArray[np.float64]:
        return np.frombuffer(self._buffer).reshape(-1, len(_Pool._fields))


def _few(
    query: Query, pool: Sequence[_Members], disagg: Disagg, rng: Random, now: float
) -> tuple[set[int], int]:
    """The places of those to compare, none when nobody decodes, and how many of the whole pool that decode
    would be compared. As `choose` of core/policy.py."""
    decoders = [(members, _costs(query, members, now)) for members in pool if members.group.role.decodes]
    if not decoders:
        return set(), 0
    kept = {_first_least([(members.places, here.queue_ms) for members, here in decoders])}
    takers = [it for it in decoders if query.handed is not None and it[0].group.kv_format == query.handed]
    if takers:
        totals_ms = [
            (members.places, here.queue_ms + here.transfer_ms + here.later_ms) for members, here in takers
        ]
        return kept | _least(totals_ms, rng), sum(len(members.places) for members, _ in takers)
    soonest_ms = min(here.queue_ms.min() for _, here in decoders)
    for kv in dict.fromkeys(members.group.kv_format for members, _ in decoders):
        first = None
        for members in pool:
            if disagg is not Disagg.NEVER and members.group[:2] == (kv, Role.PREFILL):
                first = _costs(query, members, now)
                kept |= {_first_least([(members.places, first.queue_ms)])}
                kept |= _least([(members.places, first.ready_ms)], rng)
        awaits_prefill = first is not None and first.queue_ms.min() >= soonest_ms
        totals_ms = [
            (members.places, _start_ms(query, members, here, first, disagg, awaits_prefill) + here.later_ms)
            for members, here in decoders
            if members.group.kv_format == kv
        ]
        kept |= _least(totals_ms, rng)
    return kept, sum(len(members.places) for members, _ in decoders)


def _start_ms(
    query: Query,
    members: _Members,
    here: _Costs,
    first: _Costs | None,
    disagg: Disagg,
    awaits_prefill: bool,
) -> Column:
    """The first token, by the better path. `first`: of the prefill workers that there are for it. The rest
    as `plan` of core/disagg.py."""
    local_ms: Column = here.ready_ms + here.inflicted_ms
    if first is None:
        return local_ms
    if not awaits_prefill:
        local_ms = local_ms + query.waiting_for_decode * here.prefill_ms
    if members.group.role is not Role.DECODE:
        return local_ms
    soonest = first.ready_ms.argmin()
    remote_ms: Column = np.maximum(first.ready_ms[soonest], here.queue_ms) + here.transfer_ms
    if awaits_prefill:
        remote_ms = remote_ms + query.waiting_for_prefill * first.prefill_ms[soonest]
    if disagg is Disagg.ALWAYS:
        return remote_ms
    worth_it = here.uncached_tokens >= members.group.kv_format.block_size
    return np.where(worth_it, np.minimum(remote_ms, local_ms), local_ms)


def _first_least(parts: Sequence[tuple[Indices, Column]]) -> int:
    """The first place that has the least figure."""
    found = []
    for places, column in parts:
        least = column.argmin()
        found.append((float(column[least]), int(places[least])))
    return min(found)[1]


def _least(parts: Sequence[tuple[Indices, Column]], rng: Random) -> set[int]:
    """The places with the KEPT least figures; of more that are equally the least, some at random."""
    places, values = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts, strict=True))
    if len(places) <= KEPT:
        return set(places.tolist())
    nearest = values.argpartition(KEPT)
    if values[nearest[KEPT]] == values[nearest[:KEPT]].min():
        return set(rng.sample(places[values == values[nearest[KEPT]]].tolist(), KEPT))
    return set(places[nearest[:KEPT]].tolist())


def _costs(query: Query, members: _Members, now: float) -> _Costs:
    (kv, role, _), pool, overlap = members[:3]
    prompt, output, now_ms = query.prompt_tokens, query.expected_output_tokens, pool.decode_ms
    uncached = np.maximum(1.0, prompt - overlap * kv.block_size)
    missing = np.maximum(0.0, -(-prompt // kv.block_size) - overlap)
    prompt_ms = pool.compute_ms(uncached, np.floor(uncached * (2 * prompt - uncached) / 2))
    steps = np.ceil(uncached / STEP_TOKENS)
    more_steps = np.ceil((pool.left_tokens + uncached) / STEP_TOKENS) - steps
    under_way_ms = np.maximum(0.0, pool.step_ms - (now - pool.step_began_at) * 1e3)
    inflicted_ms: Column | float = 0.0
    later_ms: Column | float = 0.0
    if role.decodes:
        counted = OUTPUT_SHARE * (pool.requests + 1)
        inflicted_ms = (np.maximum(counted, IDLE_SHARE) if role is Role.DECODE else counted) * prompt_ms
        later_ms = (OUTPUT_SHARE * output) * (now_ms + pool.more_ms(prompt + output / 2))
        later_ms = later_ms + _missed_ms(query, pool)
    return _Costs(
        uncached_tokens=uncached,
        queue_ms=under_way_ms + pool.left_ms + more_steps * now_ms + _blocked_ms(query, members, missing),
        prefill_ms=prompt_ms + steps * now_ms,
        transfer_ms=pool.transfer_ms + pool.transfer_block_ms * missing,
        inflicted_ms=inflicted_ms,
        later_ms=later_ms,
    )


def _blocked_ms(query: Query, members: _Members, needed_blocks: Column) -> Column | float:
    (kv, role, _), pool = members[:2]
    stay_tokens, free = _stay_tokens(query, pool), pool.free_blocks
    ahead = pool.requests + 1 - pool.max_running
    if role.decodes:
        free = free - np.floor(GROWTH_SHARE * stay_tokens * pool.running / kv.block_size)
    short = free < needed_blocks
    if not short.any() and ahead.max() <= 0.0:
        return 0.0
    waiting = pool.requests - pool.running
    ahead = np.maximum(0.0, np.where(short, np.maximum(ahead, waiting + 1), ahead))
    if role.decodes:
        decode_ms = pool.decode_ms - pool.decode_request_ms * waiting
        stay_ms = stay_tokens * decode_ms + pool.running * pool.usual_prompt_ms
    else:
        stay_ms = pool.transfer_ms + pool.transfer_block_ms * needed_blocks
    return ahead * stay_ms / np.maximum(1.0, pool.running + pool.held_handoffs)


def _stay_tokens(query: Query, pool: _Pool) -> Column:
    expected = max(1.0, query.expected_output_tokens)
    return np.where(pool.output_tokens == 0.0, expected, pool.output_tokens)


def _missed_ms(query: Query, pool: _Pool) -> Column | float:
    if not query.slo_itl_ms:
        return 0.0
    requests, stall_ms = pool.requests, pool.usual_prompt_ms / _stay_tokens(query, pool)

    def kept(itl_ms: Column) -> Column:
        off = (itl_ms / query.slo_itl_ms - 1) / ITL_SPREAD
        return 1 / (1 + np.exp(np.minimum(off, OFF_OBJECTIVE)))

    before = kept(pool.decode_ms + np.maximum(0.0, requests - 1) * stall_ms)
    then = kept(pool.decode_ms + pool.more_ms(query.prompt_tokens) + requests * stall_ms)
    miss_ms = MISS_SHARE * pool.compute_ms(*query.usual_prompt)
    return miss_ms * (requests * (before - then) + 1 - then)
