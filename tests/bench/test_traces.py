"""Both trace formats are read, and equal blocks become equal text."""

import gzip
import json
from pathlib import Path

import pytest

from penstock.bench.traces import BATCH_S, read_trace, replay
from penstock.errors import ConfigError

MOONCAKE = [
    {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
    {"timestamp": 0, "input_length": 1536, "output_length": 0, "hash_ids": [0, 1, 3]},
    {"timestamp": 27000, "input_length": 10, "output_length": 9, "hash_ids": [0]},
]
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.6805900,396,109
"""


@pytest.fixture
def mooncake(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl.gz"
    with gzip.open(path, "wt") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in MOONCAKE)
    return path


def test_mooncake_prompts_share_what_their_hashes_share(mooncake: Path) -> None:
    rows = read_trace(mooncake)
    by_length = {row.input_tokens: arrival for row, arrival in zip(rows, replay(rows), strict=True)}
    texts = {length: arrival.conversation.turns[0].text.split() for length, arrival in by_length.items()}
    assert {length: len(text) for length, text in texts.items()} == {1100: 1100, 1536: 1536, 10: 10}
    assert texts[1100][:1024] == texts[1536][:1024]
    assert texts[1100][1024:] != texts[1536][1024:1100]
    assert texts[10] == texts[1100][:10]
    assert by_length[1536].conversation.turns[0].output_tokens == 1, "an answer has at least one token"


def test_arrivals_are_spread_within_their_batch_and_sped_up(mooncake: Path) -> None:
    rows = read_trace(mooncake, seed=1)
    assert rows == read_trace(mooncake, seed=1)
    assert rows != read_trace(mooncake, seed=2)
    times = [row.at_s for row in rows]
    assert times[0] == 0.0
    assert 0.0 < times[1] < BATCH_S
    assert 27.0 - BATCH_S < times[2] < 27.0 + BATCH_S
    fast = [row.at_s for row in read_trace(mooncake, seed=1, speedup=10.0)]
    assert fast == pytest.approx([time / 10 for time in times])


def test_words_per_token(mooncake: Path) -> None:
    rows = [row for row in read_trace(mooncake) if row.input_tokens == 1536]
    (arrival,) = replay(rows, words_per_token=0.5)
    assert len(arrival.conversation.turns[0].text.split()) == 768


def test_azure(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(AZURE)
    rows = read_trace(path, speedup=2.0)
    assert [(row.at_s, row.input_tokens, row.output_tokens) for row in rows] == [
        (0.0, 374, 44),
        (2.0, 396, 109),
    ]
    texts = [arrival.conversation.turns[0].text for arrival in replay(rows)]
    assert texts[0][:40] != texts[1][:40]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("trace.txt", b"x"),
        ("trace.jsonl", b""),
        ("trace.jsonl", b'{"timestamp": 0}\n'),
        ("trace.jsonl", b"\xff\xfe\n"),
        ("trace.jsonl.gz", b"not gzip"),
        ("trace.csv", b"a,b\n1,2\n"),
        ("trace.csv", b"TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n"),
    ],
)
def test_bad_traces_are_refused_by_name(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="trace: "):
        read_trace(path)


def test_a_missing_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trace: "):
        read_trace(tmp_path / "none.jsonl")
