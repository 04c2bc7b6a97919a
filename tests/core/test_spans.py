from __future__ import annotations

from penstock.core.attempt_times import AttemptTimes
from penstock.core.spans import Span, attempt_span, request_span
from penstock.shapes import AttemptReport, FinishReason, Output


def outline(span: Span) -> list[tuple[str, float, float, str]]:
    return [(child.name, child.began_at, child.ended_at, child.error) for child in span.children]


def test_a_request_that_was_refused_unread_is_one_span() -> None:
    span = request_span(
        "chat", 10.0, 10.5, attributes={}, error="", read_at=10.2, tokenized_at=None, choices=()
    )
    assert span == Span("chat", 10.0, 10.5, children=[])


def test_a_request_has_its_tokenizing_its_waits_and_its_attempts() -> None:
    attempts = [
        AttemptTimes("r.1", "p0", True, 1.0, 0.0, first_output_s=2.0),
        AttemptTimes("r.2", "d0", False, 2.0),
        AttemptTimes("r.3", "d1", False, 4.0, 3.0, "d0: gone", first_output_s=5.0),
    ]
    times = {"read_at": 10.0, "tokenized_at": 10.5}
    span = request_span("chat", 9.0, 20.0, attributes={"a": 1}, error="", choices=[attempts], **times)
    assert (span.began_at, span.ended_at, span.attributes) == (9.0, 20.0, {"a": 1})
    assert outline(span) == [
        ("tokenize", 10.0, 10.5, ""),
        ("queue", 10.5, 11.0, ""),
        ("attempt", 11.0, 12.0, ""),
        ("attempt", 12.0, 13.0, "d0: gone"),
        ("queue", 13.0, 14.0, ""),
        ("attempt", 14.0, 20.0, ""),
    ]
    first = span.children[2]
    assert first.attributes == {
        "penstock.attempt": "r.1",
        "penstock.instance": "p0",
        "penstock.prefill_only": True,
    }
    assert first.events == [("first output", 12.0)]


def test_an_attempt_has_the_phases_that_the_engine_reported() -> None:
    report = AttemptReport("r.1", 1.0, 2.0, 3.0, 4.0, 9.0, output_tokens=7)
    span = attempt_span("d0", Output("r.1", [5], FinishReason.STOP), report)
    assert outline(span) == [
        ("queue", 1.0, 2.0, ""),
        ("transfer", 2.0, 3.0, ""),
        ("prefill", 3.0, 4.0, ""),
        ("decode", 4.0, 9.0, ""),
    ]
    assert span.attributes["penstock.finish_reason"] == "stop"
    failed = attempt_span("d0", Output("r.1", finish_reason=FinishReason.ERROR, error="why"), report)
    assert failed.error == "why"
