"""Public request traces, replayed as text of the same lengths and with the same common prefixes.

Mooncake (kvcache-ai/Mooncake, FAST25): JSON lines of `timestamp` in ms, `input_length` and
`output_length` in tokens, and `hash_ids`, one per 512 tokens of the prompt; equal ids stand for equal
text, so each id becomes a fixed piece of filler. Timestamps come in batches of about 3 s with some ten
requests each, an artefact of how it was recorded: arrivals are spread evenly over the batch.

Azure (AzurePublicDataset): CSV of `TIMESTAMP, ContextTokens, GeneratedTokens`; every prompt is new.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from random import Random
from typing import TextIO

import msgspec

from penstock.bench.conversations import Arrival, PlannedConversation, PlannedTurn, words
from penstock.bench.text import filler
from penstock.errors import ConfigError

BLOCK_TOKENS = 512
"""Tokens of a hash id in the Mooncake traces."""

BATCH_S = 3.0
"""Length of a batch of arrivals in the Mooncake traces."""

MAX_ROWS = 1_000_000
"""Rows of one trace, which is held in memory: its longest public ones have a tenth of that."""


class TraceRow(msgspec.Struct):
    """One request of a trace."""

    at_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: list[int] = []  # empty: nothing in common with other requests


class _MooncakeLine(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int] = []


def read_trace(path: Path, *, speedup: float = 1.0, seed: int = 0) -> list[TraceRow]:
    """The trace's rows in the order of their arrival, starting at 0 s, `speedup` times as fast.
    The format is recognized by the file's name: `.jsonl` or `.csv`, with or without `.gz`.

    Raises ConfigError for a file that cannot be read.
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
        at_s = line.timestamp / 1e3 + rng.uniform(0.0, BATCH_S)
        yield TraceRow(at_s, line.input_length, line.output_length, line.hash_ids)


def _azure_rows(lines: TextIO) -> Iterator[TraceRow]:
    for line in csv.DictReader(lines):
        at_s = datetime.fromisoformat(line["TIMESTAMP"][:26]).timestamp()
        yield TraceRow(at_s, int(line["ContextTokens"]), int(line["GeneratedTokens"]))


def replay(rows: list[TraceRow], *, words_per_token: float = 1.0, seed: int = 0) -> Iterator[Arrival]:
    """The trace's requests as conversations of one turn."""
    for number, row in enumerate(rows):
        turn = PlannedTurn(_prompt(row, number, words_per_token, seed), max(1, row.output_tokens))
        yield Arrival(row.at_s, PlannedConversation([turn]))


def _prompt(row: TraceRow, number: int, words_per_token: float, seed: int) -> str:
    if not row.hash_ids:
        return filler.__wrapped__(f"{seed}/row {number}", words(row.input_tokens, words_per_token))
    whole = words(BLOCK_TOKENS, words_per_token)
    pieces = [filler(f"{seed}/block {hash_id}", whole) for hash_id in row.hash_ids]
    last_tokens = row.input_tokens - BLOCK_TOKENS * (len(pieces) - 1)
    if last_tokens < BLOCK_TOKENS:
        last_words = words(max(1, last_tokens), words_per_token)
        pieces[-1] = " ".join(pieces[-1].split(" ", last_words)[:last_words])
    return " ".join(pieces)
