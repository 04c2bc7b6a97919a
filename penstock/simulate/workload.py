"""What clients ask for, as lengths and common prefixes: sessions of turns, from a trace or made up.

A prompt is a sequence of pieces, each a key and a number of tokens: equal keys are equal text. So a load
has what routing depends on, and no text. Equal seeds give equal loads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import count

import msgspec

from penstock.bench.traces import TraceRow

Piece = tuple[int, int]
"""A key, below 2^31, and a number of tokens."""


class SimulatedTurn(msgspec.Struct, frozen=True):
    """A request of a session. Its prompt is what the session said before, answers included, and `new`."""

    new: list[Piece]
    output_tokens: int
    think_s: float = 0.0  # from the end of the answer before
    kept_tokens: int | None = None  # only so many of what was said before; None: all
    answer: list[Piece] = []  # of `output_tokens`; empty: it has nothing in common with any prompt


class ClientSession(msgspec.Struct, frozen=True):
    """Turns that are sent one after the other; the first one at `at_s` where the load is an open one."""

    turns: list[SimulatedTurn]
    at_s: float = 0.0
    name: str = ""  # equal for what belongs together; empty: it has a name if it has several turns


class Workload(msgspec.Struct, frozen=True):
    """All sessions. `users`: how many at one time, the next one beginning when one ends; None: each begins
    at its own time, whatever happens to the others."""

    sessions: Iterable[ClientSession]
    users: int | None = None
    until_s: float = math.inf  # nothing is sent from then on


def from_trace(rows: Iterable[TraceRow]) -> Iterator[ClientSession]:
    """A session of one request for each row of a trace."""
    keys = count(1 << 30)
    for row in rows:
        new, answer = _pieces(row) if row.hash_ids else ([(next(keys), row.input_tokens)], [])
        turn = SimulatedTurn(new, max(1, row.output_tokens), answer=answer)
        name = f"recorded-{row.session}" if row.session is not None else ""
        yield ClientSession([turn], row.at_s, name)


def _pieces(row: TraceRow) -> tuple[list[Piece], list[Piece]]:
    """Of its prompt and its answer."""
    size, length = row.block_tokens, row.input_tokens
    if not row.output_hash_ids or not row.output_tokens:
        return _between(row.hash_ids, size, 0, length), []
    # The block in which the answer begins is named with all that is in it, as later prompts have it.
    hash_ids = row.hash_ids[: length // size] + row.output_hash_ids
    return (
        _between(hash_ids, size, 0, length),
        _between(hash_ids, size, length, length + row.output_tokens),
    )


def _between(hash_ids: list[int], size: int, begin: int, end: int) -> list[Piece]:
    """The pieces of the tokens from `begin` to `end` in blocks of `size`; the last block is as long as it
    must be."""
    pieces = []
    last = len(hash_ids) - 1
    for number in range(min(begin // size, last), min((end - 1) // size, last) + 1):
        until = end if number == last else min(end, (number + 1) * size)
        pieces.append((hash_ids[number], until - max(begin, number * size)))
    return pieces


def tokens_of(pieces: Iterable[Piece]) -> list[int]:
    """The token ids of a prompt."""
    token_ids: list[int] = []
    for key, tokens in pieces:
        token_ids += [key] * tokens
    return token_ids
