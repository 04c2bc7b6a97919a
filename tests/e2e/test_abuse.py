"""Garbage, floods, slow readers and hang-ups at every open port: clear answers, and nothing dies."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import ANSWER_S, MODEL, ROOT, START_S, Graph, running
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graph]:
    state: Path = tmp_path_factory.mktemp("abuse") / "state"
    with running(ROOT / "deploy" / "local.yaml", state, instances=4) as graph:
        yield graph


@pytest.fixture(autouse=True)
def _nothing_died(graph: Graph) -> Iterator[None]:
    """Whatever a test did, the same processes still answer afterwards, and hold nothing."""
    before = {replica["pid"] for replica in graph.replicas()}
    yield
    assert {replica["pid"] for replica in graph.replicas()} == before
    graph.wait_healthy(instances=4)
    answer = graph.client().completions.create(model=MODEL, prompt="Hello", max_tokens=2)
    assert answer.usage is not None
    assert answer.usage.completion_tokens >= 1
    wait_until(lambda: used_blocks(graph) == 0, "blocks are in use", START_S, look_s=0.2)


def used_blocks(graph: Graph) -> float:
    return graph.metric("penstock_worker_used_blocks") + graph.metric("penstock_worker_running")


def link_ports(graph: Graph) -> list[int]:
    health = json.loads(graph.get("/health")[1])
    return [int(instance["address"].rpartition(":")[2]) for instance in health["instances"]]


def send(port: int, data: bytes, *, stays: bool = False) -> bytes:
    """Send, then read what comes until the other side has had enough. `stays`: without closing this side
    before, which to an HTTP server is a client that has left."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_S) as connection:
        with contextlib.suppress(OSError):  # hung up on while still sending
            connection.sendall(data)
            if not stays:
                connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            while part := connection.recv(65536):
                received += part
    return received


def post(path: str, body: bytes, length: int | None = None, extra: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{extra}"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


def chat(stream: bool, max_tokens: int = 3000) -> bytes:
    return json.dumps(
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": "Explain disaggregated serving benefits"}],
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "stream": stream,
        }
    ).encode()


def test_random_bytes_at_every_port(graph: Graph) -> None:
    rng = random.Random(1)
    for port in [graph.port, *link_ports(graph)]:
        for size in (1, 4, 100, 5000, 300_000):
            send(port, rng.randbytes(size))


def test_http_talk_at_the_link_and_link_talk_at_http(graph: Graph) -> None:
    for port in link_ports(graph):
        send(port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert send(graph.port, b"\x00\x00\x00\x05\x81\xa1t\xa5hello").startswith(b"HTTP/1.1 400")


def test_enormous_frames_and_bodies(graph: Graph) -> None:
    for port in link_ports(graph):
        send(port, b"\xff\xff\xff\xff" + b"x" * 100_000)
    refused = send(graph.port, post("/v1/chat/completions", b"{" * 1000, length=10**12))
    assert refused.startswith(b"HTTP/1.1 413")
    assert b"body_too_large" in refused


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"null", 400),
        (b"[]", 400),
        (b"{", 400),
        (b"[" * 100_000, 400),
        (b'{"model": "tiny", "messages": []}', 400),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": -1}', 400),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', 400),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "n": 1000000}', 400),
        (b'{"model": "other", "messages": [{"role": "user", "content": "x"}]}', 404),
    ],
)
def test_bad_bodies(graph: Graph, body: bytes, status: int) -> None:
    answer = send(graph.port, post("/v1/chat/completions", body, extra="Connection: close\r\n"), stays=True)
    assert answer.startswith(f"HTTP/1.1 {status}".encode()), answer
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert error["message"]


def test_too_long_a_prompt_names_both_lengths(graph: Graph) -> None:
    body = json.dumps({"model": MODEL, "prompt": [400] * 100_000}).encode()
    answer = send(graph.port, post("/v1/completions", body, extra="Connection: close\r\n"), stays=True)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"100000" in answer
    assert b"context_length_exceeded" in answer


def test_abrupt_hang_ups(graph: Graph) -> None:
    """Fifty clients that leave at any moment, streaming or not."""
    rng = random.Random(2)
    for number in range(50):
        with socket.create_connection(("127.0.0.1", graph.port), timeout=ANSWER_S) as connection:
            connection.sendall(post("/v1/chat/completions", chat(stream=number % 2 == 0)))
            time.sleep(rng.random() * 0.05)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")


def test_a_reader_that_does_not_read_holds_up_nobody(graph: Graph) -> None:
    with socket.create_connection(("127.0.0.1", graph.port), timeout=ANSWER_S) as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.sendall(post("/v1/chat/completions", chat(stream=True)))
        for _ in range(5):
            answer = graph.client().completions.create(model=MODEL, prompt="Hello", max_tokens=8)
            assert answer.choices[0].finish_reason in ("stop", "length")


def test_half_open_connections_do_not_keep_others_out(graph: Graph) -> None:
    with contextlib.ExitStack() as stack:
        for port in [graph.port, *link_ports(graph)]:
            for _ in range(100):
                stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=ANSWER_S))
        graph.wait_healthy(instances=4)
        answer = graph.client().completions.create(model=MODEL, prompt="Hello", max_tokens=2)
        assert answer.choices[0].finish_reason in ("stop", "length")
