"""Spans on their way to a collector that is there, dead, or silent."""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
import time

import pytest

from penstock.core.spans import Span
from penstock.errors import ConfigError
from penstock.shapes import TraceContext
from penstock.tracing import CLOSE_S, OtelTracing, otel_tracing
from tests.otlp_receiver import otlp_receiver
from tests.ports import free_port
from tests.waiting import wait_until

GIVEN = TraceContext("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "vendor=1")
QUEUE_SPANS = 2048  # the SDK's default
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")


@pytest.fixture
def tracing_to(monkeypatch: pytest.MonkeyPatch):
    def start(url: str) -> OtelTracing:
        monkeypatch.setenv(ENDPOINT, url)
        return otel_tracing("penstock-worker", "w0", url, {ENDPOINT: url})

    return start


def record_many(tracing: OtelTracing, count: int = 3 * QUEUE_SPANS) -> float:
    """Seconds that it took."""
    began = time.perf_counter()
    now = time.monotonic()
    for _ in range(count):
        tracing.record(Span("worker", now - 1.0, now), GIVEN)
    return time.perf_counter() - began


def test_a_request_is_a_part_of_what_its_client_gave_and_refers_to_itself(tracing_to) -> None:
    with otlp_receiver() as receiver:
        tracing = tracing_to(receiver.url)
        now = time.monotonic()
        begun = tracing.begin("chat", GIVEN, now - 2.0)
        assert begun.recording
        assert begun.context.tracestate == GIVEN.tracestate
        _, trace_id, span_id, flags = begun.context.traceparent.split("-")
        children = [Span("b", now, now)]
        begun.end(Span("chat", now - 2.0, now, {"a": 1}, "why", [("first", now - 1.0)], children))
        asyncio.run(tracing.close())
        below, root = receiver.wait(2)
    assert (root.trace_id, root.span_id, root.parent_id) == (trace_id, span_id, GIVEN.traceparent[36:52])
    assert (root.attributes, root.error, flags) == ({"a": 1}, "why", "01")
    assert abs(time.time_ns() - root.ended_ns) < 20e9
    assert root.ended_ns - root.began_ns == pytest.approx(2e9, abs=1.0)
    assert (below.name, below.parent_id) == ("b", span_id)


def test_a_dead_collector_costs_no_time_and_one_line_until_it_is_back(tracing_to, caplog) -> None:
    caplog.set_level(logging.INFO)
    port = free_port()
    tracing = tracing_to(f"http://127.0.0.1:{port}")
    assert record_many(tracing) < 20.0
    lines = lambda: [it.getMessage() for it in caplog.records if it.name == "penstock.tracing"]  # noqa: E731
    wait_until(lines, lambda: "no line", 30)
    record_many(tracing, 100)
    (line,) = lines()
    assert line.startswith(f"http://127.0.0.1:{port} takes no spans, which are dropped: ")
    began = time.perf_counter()
    asyncio.run(tracing.close())
    assert time.perf_counter() - began < CLOSE_S + 7.0


def test_a_silent_collector_does_not_hold_up_the_end(tracing_to) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracing = tracing_to(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert record_many(tracing) < 20.0
        began = time.perf_counter()
        asyncio.run(tracing.close())
        assert time.perf_counter() - began < CLOSE_S + 7.0


def test_an_unknown_protocol_is_refused(tracing_to) -> None:
    for protocol, message in (("udp", "none of http/protobuf, grpc"), ("grpc", "pip install")):
        with pytest.raises(ConfigError, match=message):
            otel_tracing("s", "i", "http://x", {"OTEL_EXPORTER_OTLP_PROTOCOL": protocol})


def test_nothing_of_opentelemetry_is_imported_where_it_is_not_configured() -> None:
    program = "import sys, penstock.assembly as a; assert a._tracing('s', 'i') is None; print(*sys.modules)"
    environ = {"PATH": "/usr/bin:/bin", "OTEL_SDK_DISABLED": "true", ENDPOINT: "http://127.0.0.1:1"}
    for env in ({"PATH": "/usr/bin:/bin"}, environ):
        modules = subprocess.run(
            [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
        ).stdout
        assert "penstock.assembly" in modules
        assert "opentelemetry" not in modules
