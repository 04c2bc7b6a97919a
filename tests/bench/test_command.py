"""The command against a server on the loopback, as the CLI runs it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from penstock.bench.command import bench, calibrate, first_model
from penstock.bench.http_client import HttpClient
from penstock.errors import ConfigError


@pytest.fixture
def server(completion_server: Any) -> Iterator[Any]:
    """A server in a thread of its own: the command brings its own event loop."""
    started, ended = threading.Event(), threading.Event()
    served = completion_server()

    async def serve() -> None:
        async with served:
            started.set()
            await asyncio.to_thread(ended.wait)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert started.wait(5)
    yield served
    ended.set()
    thread.join(5)


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(bench)
    return CliRunner().invoke(app, list(arguments))


def test_a_closed_loop_with_a_report(server: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    result = run("--url", server.url, "--requests", "6", "--concurrency", "2", "--json", str(path))
    assert result.exit_code == 0, result.output
    assert "6 ok, 0 failed" in result.output
    assert "time to first token" in result.output
    report = json.loads(path.read_text())
    assert report["ok"] == 6
    assert report["output_tokens"] == 30
    assert server.requests[0]["model"] == "tiny"


def test_an_open_loop_of_synthetic_conversations_with_goodput(server: Any) -> None:
    result = run(
        *("--url", server.url, "--rate", "50/s", "--requests", "6", "--multi-turn", "2"),
        *("--prompt-tokens", "40", "--output-tokens", "5", "--shared-prefix-tokens", "20"),
        *("--slo-ttft-ms", "5000", "--slo-itl-ms", "5000"),
    )
    assert result.exit_code == 0, result.output
    assert "goodput" in result.output
    first = server.requests[0]
    assert first["ignore_eos"] is True
    system, user = (message["content"].split() for message in first["messages"][:2])
    assert (len(system), len(user)) == (10, 20), "this server's tokenizer makes 2 tokens of a word"


def test_a_trace(server: Any, tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,30,4\n2023-11-16 18:15:48.6805900,10,5\n"
    )
    result = run("--url", server.url, "--trace", str(path), "--speedup", "20")
    assert result.exit_code == 0, result.output
    assert "2 ok" in result.output
    assert [request["max_tokens"] for request in server.requests] == [4, 5]


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [
        ("404 Not Found", {"message": "no such model", "param": "model"}, "model: .*no such model"),
        ("400 Bad Request", {"message": "too hot", "param": "temperature"}, "temperature: .*too hot"),
        ("401 Unauthorized", {"message": "no key", "param": None}, "api-key: .*no key"),
        ("405 Method Not Allowed", {}, "url: .*405"),
    ],
)
@pytest.mark.parametrize("lengths", [(), ("--prompt-tokens", "40")])
def test_a_run_of_which_all_would_be_refused_does_not_begin(
    server: Any, status, error, said, lengths
) -> None:
    server.refuses = (status, error)
    result = run("--url", server.url, "--model", "unknown", *lengths)
    assert isinstance(result.exception, ConfigError)
    assert re.match(said, str(result.exception))
    assert server.requests == []


def test_a_server_that_is_busy_before_the_run_may_serve_it(server: Any) -> None:
    server.refuses = ("429 Too Many Requests", {"message": "busy"})
    assert run("--url", server.url, "--requests", "2").exit_code == 0


def test_nothing_ok_exits_with_1(server: Any) -> None:
    server.trouble = {1: "429"}
    result = run("--url", server.url, "--requests", "1")
    assert result.exit_code == 1
    assert "http 429" in result.output


def test_interrupted_it_reports_what_there_is(server: Any) -> None:
    server.trouble = {3: "hang"}

    def interrupt() -> None:
        while len(server.requests) < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    result = run("--url", server.url, "--requests", "9", "--concurrency", "1", "--timeout", "20")
    interrupting.join()
    assert result.exit_code == 0, result.output
    assert "interrupted" in result.output
    assert "2 ok, 1 failed" in result.output
    assert "unfinished" in result.output


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--rate", "fast"], "rate"),
        (["--rate", "1/s", "--trace", "x.csv"], "rate"),
        (["--arrival", "bursty"], "arrival"),
        (["--trace", "missing.csv"], "trace"),
        (["--url", "ftp://x"], "url"),
    ],
)
def test_bad_arguments_name_their_field(arguments: list[str], field: str) -> None:
    result = run(*arguments)
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).startswith(f"{field}: ")


def test_a_server_that_does_not_answer_is_an_error_of_the_url(server: Any) -> None:
    result = run("--url", "http://127.0.0.1:9", "--requests", "1")
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).startswith("url: ")


async def test_a_server_without_models_or_usage() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as listener:
        client = HttpClient(f"127.0.0.1:{listener.sockets[0].getsockname()[1]}")
        with pytest.raises(ConfigError, match="404"):
            await first_model(client)
        with pytest.raises(ConfigError, match="404"):
            await calibrate(client, "m")
        await client.close()
