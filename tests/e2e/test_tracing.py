"""Traces of a graph of real processes, as a collector gets them."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.e2e.conftest import ANSWER_S, START_S, STOP_S, Process
from tests.otlp_receiver import OtlpReceiver, ReceivedSpan, otlp_receiver
from tests.waiting import wait_until

MODEL = "models/tiny"
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


@pytest.fixture(scope="module")
def receiver() -> Iterator[OtlpReceiver]:
    with otlp_receiver() as running:
        yield running


@pytest.fixture(scope="module")
def frontend(tmp_path_factory: pytest.TempPathFactory, receiver: OtlpReceiver) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("traced")
    discovery = f"file:{folder / 'discovery'}"
    otel = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, "OTEL_BSP_SCHEDULE_DELAY": "100"}
    processes = [
        Process(folder, discovery, f"{role}-0", "worker", "--role", role, "--model", MODEL,
                "--instance-id", f"{role}-0", **otel)
        for role in ("prefill", "decode")
    ]  # fmt: skip
    options = ("--expect", "prefill,decode", "--disagg", "always")
    frontend = Process(folder, discovery, "f-0", "frontend", *options, **otel)
    processes.append(frontend)
    try:
        logs = lambda: "\n".join(it.log.read_text()[-2000:] for it in processes)  # noqa: E731
        wait_until(lambda: frontend.ready_workers() == 2, logs, START_S)
        yield frontend
    finally:
        for process in processes:
            process.stop()
        for process in processes:
            assert process.process.wait(timeout=STOP_S) == 0


def ask(frontend: Process, **headers: str) -> httpx.Response:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    return httpx.post(f"{frontend.url}/v1/chat/completions", json=body, headers=headers, timeout=ANSWER_S)


def test_a_request_is_one_trace_over_frontend_and_workers(
    frontend: Process, receiver: OtlpReceiver
) -> None:
    traceparent = f"00-{TRACE}-{PARENT}-01"
    assert ask(frontend, traceparent=traceparent, tracestate="vendor=1").status_code == 200
    wait_until(lambda: len(of_trace(receiver)) >= 13, lambda: str(of_trace(receiver)), START_S)
    spans = of_trace(receiver)
    (root,) = [span for span in spans if span.parent_id == PARENT]
    assert (root.service, root.name) == ("penstock-frontend", "chat_completions")
    assert root.attributes["http.response.status_code"] == 200
    assert root.attributes["gen_ai.request.model"] == "tiny"
    assert root.attributes["gen_ai.usage.output_tokens"] == 4
    below = {name: named(spans, name, root) for name in ("tokenize", "queue", "attempt", "worker")}
    assert {name: len(found) for name, found in below.items()} == {
        "tokenize": 1,
        "queue": 1,
        "attempt": 2,
        "worker": 2,
    }
    workers = {span.attributes["penstock.instance"]: span for span in below["worker"]}
    assert {span.service for span in workers.values()} == {"penstock-worker"}
    phases = {
        name: [span.name for span in sorted(spans, key=began) if span.parent_id == worker.span_id]
        for name, worker in workers.items()
    }
    assert phases == {
        "prefill-0": ["queue", "prefill"],
        "decode-0": ["queue", "transfer", "prefill", "decode"],
    }
    for span in spans:
        assert root.began_ns <= span.began_ns <= span.ended_ns
        assert span.error == ""
    for attempt in below["attempt"]:
        worker = workers[attempt.attributes["penstock.instance"]]
        assert attempt.attributes["penstock.attempt"] == worker.attributes["penstock.attempt"]
        assert attempt.began_ns <= worker.began_ns


def test_a_trace_that_its_client_does_not_sample_has_no_spans(
    frontend: Process, receiver: OtlpReceiver
) -> None:
    unwanted = "11" * 16
    assert ask(frontend, traceparent=f"00-{unwanted}-{PARENT}-00").status_code == 200
    assert ask(frontend).status_code == 200
    wait_until(
        lambda: any(not span.parent_id and span.name == "chat_completions" for span in receiver.spans),
        lambda: str(receiver.spans),
        START_S,
    )
    assert unwanted not in {span.trace_id for span in receiver.spans}


def test_a_refused_request_has_a_span_with_its_status(frontend: Process, receiver: OtlpReceiver) -> None:
    response = httpx.post(
        f"{frontend.url}/v1/completions", json={"model": "none", "prompt": "x"}, timeout=ANSWER_S
    )
    assert response.status_code == 404
    refused = lambda: [  # noqa: E731
        span for span in receiver.spans if span.attributes.get("http.response.status_code") == 404
    ]
    wait_until(refused, lambda: str(receiver.spans), START_S)
    (span,) = refused()
    assert (span.name, span.attributes["penstock.outcome"], span.error) == ("completions", "rejected", "")


def began(span: ReceivedSpan) -> int:
    return span.began_ns


def of_trace(receiver: OtlpReceiver) -> list[ReceivedSpan]:
    return [span for span in receiver.spans if span.trace_id == TRACE]


def named(spans: list[ReceivedSpan], name: str, parent: ReceivedSpan) -> list[ReceivedSpan]:
    return [span for span in spans if span.name == name and span.parent_id == parent.span_id]
