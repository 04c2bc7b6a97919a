"""`penstock record` at a running graph; `penstock simulate` and `penstock bench` with what it writes."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.e2e.conftest import MODEL, START_S, STOP_S, Graph
from tests.waiting import wait_until

BLOCK = 16
SECRET = "The hippopotamus is called Beatrice. " * 20


@contextlib.contextmanager
def recording(graph: Graph, file: Path, requests: int) -> Iterator[None]:
    """While this lasts, `penstock record` runs; until it has written so many requests."""
    arguments = ["record", str(file), "--url", graph.url, "--block-tokens", str(BLOCK)]
    process = subprocess.Popen(
        [sys.executable, "-m", "penstock", *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stderr is not None
        assert b"recording" in process.stderr.readline()
        yield
        wait_until(lambda: file.read_bytes().count(b"\n") >= requests, "it writes them", START_S)
    finally:
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=STOP_S)
    assert process.returncode == 0, errors
    assert b"requests" in out


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_recorded_conversation_is_simulated_and_replayed(local_graph: Graph, tmp_path: Path) -> None:
    file, reports = tmp_path / "recorded.jsonl", tmp_path / "reports.json"
    client = local_graph.client()
    messages: list[Any] = [{"role": "user", "content": SECRET}]
    prompt_tokens = []
    with recording(local_graph, file, requests=3):
        for _ in range(3):
            answer = client.chat.completions.create(
                model=MODEL,
                messages=messages,
                max_tokens=40,
                extra_headers={"x-session-id": "Beatrice's"},
            )
            assert answer.usage is not None
            prompt_tokens.append(answer.usage.prompt_tokens)
            messages.append({"role": "assistant", "content": answer.choices[0].message.content})
            messages.append({"role": "user", "content": "Go on."})
            time.sleep(0.2)
    rows = rows_of(file)
    assert [row["input_length"] for row in rows] == prompt_tokens
    assert rows[0]["timestamp"] == 0
    assert 200 <= rows[1]["timestamp"] <= rows[2]["timestamp"] - 200
    assert {row["session"] for row in rows} == {0}
    whole = prompt_tokens[0] // BLOCK
    assert rows[0]["hash_ids"][:whole] == rows[1]["hash_ids"][:whole] == list(range(whole))
    for text in ("Beatrice", "hippopotamus"):
        assert text not in file.read_text()

    simulated = local_graph.command(
        "simulate",
        "--trace",
        str(file),
        "--block-size",
        str(BLOCK),
        "--workers",
        "1",
        "--json",
        str(reports),
    )
    assert simulated.returncode == 0, simulated.stderr
    (report,) = json.loads(reports.read_bytes())
    assert (report["requests"], report["errors"]) == (3, {})
    shared = sum(
        BLOCK * len(set(row["hash_ids"]) & {*before["hash_ids"], *before["output_hash_ids"]})
        for before, row in pairwise(rows)
    )
    assert shared > BLOCK * (whole + whole)
    cached_tokens = report["cached_share"] * sum(prompt_tokens)
    assert abs(cached_tokens - shared) <= 2 * BLOCK, "all that a prompt shares with the turn before"

    replayed = local_graph.command("bench", "--url", local_graph.url, "--trace", str(file))
    assert replayed.returncode == 0, replayed.stderr


def test_a_recording_that_cannot_be_made_says_why(local_graph: Graph, tmp_path: Path) -> None:
    there = tmp_path / "there.jsonl"
    there.touch()
    for arguments, error in (
        ([str(there)], "File exists"),
        ([str(tmp_path / "trace.csv")], "must end in .jsonl"),
        ([str(tmp_path / "t.jsonl"), "--url", "http://127.0.0.1:9"], "refused"),
    ):
        ran = local_graph.command("record", *arguments)
        assert ran.returncode != 0
        assert error in ran.stderr
