"""Reads request traces, and plans their replay with texts of equal lengths and equal common
prefixes.

Mooncake (kvcache-ai/Mooncake, FAST25): JSON lines of `timestamp` in ms, `input_length` and `output_length`
in tokens, and `hash_ids`, one per 512 tokens of the prompt. Equal ids mean equal text, so each id becomes a
fixed piece of filler. The recording rounded timestamps to batches of about 3 s, with some ten requests
each; the replay spreads them evenly over the batch.

`penstock record` writes the same, with more fields (core/recording.py): with these, times are exact, and
blocks may have another length.

Azure (AzurePublicDataset): CSV of `TIMESTAMP, ContextTokens, GeneratedTokens`; every prompt is new.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from random import Random
from typing import Annotated, TextIO

import msgspec
from msgspec import Meta

from penstock.bench.conversations import Arrival, PlannedConversation, PlannedTurn, words
from penstock.bench.text import filler
from penstock.errors import ConfigError

BLOCK_TOKENS = 512
"""Number of tokens per hash id in traces that do not say it, as Mooncake's."""

BATCH_S = 3.0
"""Length of a batch of arrivals in traces that do not say it, as Mooncake's."""

MAX_HASH_ID = 2**30 - 1
"""Ids are numbers of blocks, and not hashes: tokens are made of them."""

HashIds = list[Annotated[int, Meta(ge=0, le=MAX_HASH_ID)]]

MAX_ROWS = 1_000_000
"""Most rows of a trace, which is kept in memory. The longest public traces have a tenth of this."""


class TraceRow(msgspec.Struct):
    """One request of a trace."""

    at_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: list[int] = []  # empty: no text in common with other requests
    output_hash_ids: list[int] = []  # as RecordedRequest has them; empty: not known
    block_tokens: int = BLOCK_TOKENS
    session: int | None = None


class _MooncakeLine(msgspec.Struct):
    timestamp: float
    input_length: Annotated[int, Meta(ge=1)]
    output_length: Annotated[int, Meta(ge=0)]
    hash_ids: HashIds = []
    output_hash_ids: HashIds = []
    block_tokens: Annotated[int, Meta(ge=1)] = BLOCK_TOKENS
    rounded_ms: Annotated[float, Meta(ge=0)] = BATCH_S * 1e3
    session: int | None = None


def read_trace(path: Path, *, speedup: float = 1.0, seed: int = 0) -> list[TraceRow]:
    """The rows of a trace in order of arrival, beginning at 0 s, with times divided by `speedup`. The
    file's name determines the format: `.jsonl` or `.csv`, with or without `.gz`.

    Raises ConfigError if the file cannot be read.
    """
    name = path.name.removesuffix(".gz")
    if not name.endswith((".jsonl", ".csv")):
        raise ConfigError(f"trace: `{path}` is neither .jsonl nor .csv (nor one of these with .gz)")
    rows: list[TraceRow] = []
    try:
        with _open(path) as lines:
            source = _mooncake_rows(lines, seed) if name.endswith(".jsonl") else _azure_rows(lines)
            for row in source:
                rows.append(row)
                if len(rows) > MAX_ROWS:
                    raise ConfigError(f"trace: `{path}` has more than {MAX_ROWS} rows")
    except (OSError, EOFError, ValueError, KeyError, msgspec.MsgspecError) as error:
        raise ConfigError(f"trace: `{path}`, row {len(rows) + 1}: {error}") from error
    if not rows:
        raise ConfigError(f"trace: `{path}` is empty")
    rows.sort(key=lambda row: row.at_s)
    start_s = rows[0].at_s
    for row in rows:
        row.at_s = (row.at_s - start_s) / speedup
    return rows


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _mooncake_rows(lines: TextIO, seed: int) -> Iterator[TraceRow]:
    rng = Random(f"{seed}/jitter")
    decode = msgspec.json.Decoder(_MooncakeLine).decode
    for text in lines:
        line = decode(text)
        at_s = (line.timestamp + rng.uniform(0.0, line.rounded_ms)) / 1e3
        yield TraceRow(
            at_s,
            line.input_length,
            line.output_length,
            line.hash_ids,
            line.output_hash_ids,
            line.block_tokens,
            line.session,
        )


def _azure_rows(lines: TextIO) -> Iterator[TraceRow]:
    for line in csv.DictReader(lines):
        at_s = datetime.fromisoformat(line["TIMESTAMP"][:26]).timestamp()
        yield TraceRow(at_s, int(line["ContextTokens"]), int(line["GeneratedTokens"]))


def replay(rows: list[TraceRow], *, words_per_token: float = 1.0, seed: int = 0) -> Iterator[Arrival]:
    """The requests of a trace as conversations of one turn each."""
    for number, row in enumerate(rows):
        turn = PlannedTurn(_prompt(row, number, words_per_token, seed), max(1, row.output_tokens))
        yield Arrival(row.at_s, PlannedConversation([turn]))


def _prompt(row: TraceRow, number: int, words_per_token: float, seed: int) -> str:
    if not row.hash_ids:
        return filler.__wrapped__(f"{seed}/row {number}", words(row.input_tokens, words_per_token))
    whole = words(row.block_tokens, words_per_token)
    pieces = [filler(f"{seed}/block {hash_id}", whole) for hash_id in row.hash_ids]
    last_tokens = row.input_tokens - row.block_tokens * (len(pieces) - 1)
    if last_tokens < row.block_tokens:
        last_words = words(max(1, last_tokens), words_per_token)
        pieces[-1] = " ".join(pieces[-1].split(" ", last_words)[:last_words])
    return " ".join(pieces)
