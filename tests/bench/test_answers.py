"""Streams are understood however the bytes are cut."""

import itertools
import json

import hypothesis.strategies as st
import pytest
from hypothesis import given

from penstock.bench.answers import MAX_EVENT_BYTES, JsonAnswer, StreamedAnswer

CHUNKS = [
    {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
    {"choices": [{"delta": {"content": "Hel"}}]},
    {"choices": [{"delta": {"content": "lo\r\n\u00e9"}}]},
    {"choices": [{"delta": {"content": "!"}, "finish_reason": "stop"}]},
    {
        "choices": [],
        "usage": {
            "prompt_tokens": 9,
            "completion_tokens": 4,
            "prompt_tokens_details": {"cached_tokens": 8},
        },
    },
]


def stream(line_end: str = "\n") -> bytes:
    events = [f"data: {json.dumps(chunk)}" for chunk in CHUNKS] + [": keep-alive", "data: [DONE]"]
    return "".join(event + 2 * line_end for event in events).encode()


@given(st.sampled_from(["\n", "\r\n"]), st.lists(st.integers(1, 600), max_size=8))
def test_any_cut_gives_the_same_answer(line_end: str, cuts: list[int]) -> None:
    data = stream(line_end)
    gaps: list[float] = []
    answer = StreamedAnswer(gaps.append, keep_text=True)
    answer.on_status(200)
    edges = [0, *sorted(cuts), len(data)]
    for now, (start, end) in enumerate(itertools.pairwise(edges)):
        answer.on_body(data[start:end], float(now))
    assert answer.complete
    assert answer.text == "Hello\r\n\u00e9!"
    assert answer.finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.usage.cached_tokens) == (4, 8)
    assert answer.chunks == 3
    assert len(gaps) == 2
    assert answer.first_at is not None
    assert answer.last_at - answer.first_at == sum(gaps)


def test_completions_and_named_events() -> None:
    answer = StreamedAnswer(keep_text=True)
    answer.on_status(200)
    answer.on_body(b'event: x\ndata:{"choices":[{"text":"a","finish_reason":"length"}]}\n\n', 1.0)
    answer.on_body(b"data: [DONE]\n\n", 2.0)
    assert answer.complete
    assert answer.text == "a"
    assert answer.usage is None


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b'data: {"error": {"message": "engine died"}}\n\n', "stream error"),
        (b"data: {nonsense\n\n", "protocol"),
        (b'data: {"choices": 3}\n\n', "protocol"),
        (b"x" * (MAX_EVENT_BYTES + 1), "protocol"),
    ],
)
def test_failures_in_the_stream(body: bytes, kind: str) -> None:
    answer = StreamedAnswer()
    answer.on_status(200)
    answer.on_body(body, 1.0)
    answer.on_body(b"data: [DONE]\n\n", 2.0)
    assert answer.failure is not None
    assert answer.failure[0] == kind
    assert not answer.complete


def test_an_error_status_keeps_its_message() -> None:
    answer = StreamedAnswer()
    answer.on_status(503)
    answer.on_body(b'{"error": ', 1.0)
    answer.on_body(b'"no worker"}', 1.0)
    assert answer.failure == ("http 503", '{"error": "no worker"}')


def test_a_document() -> None:
    answer = JsonAnswer()
    answer.on_status(200)
    answer.on_body(b'{"a":', 0.0)
    assert answer.decode() is None
    answer.on_body(b"1}", 0.0)
    assert answer.decode() == {"a": 1}
