"""Chunks, byte by byte."""

import asyncio
import json

from penstock.errors import Rejection, RequestRejected
from penstock.frontend.chat import ChatChunks
from penstock.frontend.choice import Choice
from penstock.frontend.completion_objects import Envelope
from penstock.frontend.completions import CompletionChunks
from penstock.frontend.sse import DONE
from penstock.shapes import Delta, FinishReason, ModelKey, Request, Sampling

ENVELOPE = Envelope("id-1", "chunk", 123, 'a "model"', "fp_x")
SHARED = {
    "id": "id-1",
    "object": "chunk",
    "created": 123,
    "model": 'a "model"',
    "system_fingerprint": "fp_x",
}


class Says:
    """A detokenizer that has a text prepared for each token."""

    def __init__(self, texts):
        self._texts = texts

    def push(self, token_ids):
        return "".join(self._texts[token_id] for token_id in token_ids)

    def flush(self):
        return ""


def chunks_of(kind, *, include_usage=False, texts=('He said "hi"\n\u2028', "", "é😀\x00")):
    chunks = kind(ENVELOPE, 2, include_usage=include_usage)
    answer = Choice(1, Request("r", ModelKey("m", "v"), [1, 2], Sampling(max_tokens=9)), Says(texts))
    found = []
    for token_id in range(len(texts)):
        answer.feed(Delta([token_id]))
        found.append(chunks.chunk(answer))
    answer.feed(Delta([], finish_reason=FinishReason.STOP))
    return [*found, chunks.chunk(answer)], asyncio.run(chunks.end([answer]))


def parsed(event):
    assert event.startswith(b"data: ")
    assert event.endswith(b"}\n\n")
    assert event.count(b"\n") == 2
    return json.loads(event[6:])


def choice(**fields):
    return {**SHARED, "choices": [{"index": 1, **fields}]}


def test_chat_chunks():
    (first, nothing, second, last), _ = chunks_of(ChatChunks)
    plain = {"logprobs": None, "finish_reason": None}
    assert parsed(first) == choice(delta={"role": "assistant", "content": 'He said "hi"\n\u2028'}, **plain)
    assert nothing == b""
    assert parsed(second) == choice(delta={"content": "é😀\x00"}, **plain)
    assert parsed(last) == choice(
        delta={"content": ""}, logprobs=None, finish_reason="stop", stop_reason=None
    )


def test_text_chunks():
    (first, _, second, last), _ = chunks_of(CompletionChunks)
    assert parsed(first)["choices"][0]["text"] == 'He said "hi"\n\u2028'
    assert parsed(second)["choices"][0] == {
        "index": 1,
        "text": "é😀\x00",
        "logprobs": None,
        "finish_reason": None,
    }
    assert parsed(last)["choices"][0]["finish_reason"] == "stop"


def test_usage_is_null_until_its_own_chunk():
    found, end = chunks_of(ChatChunks, include_usage=True)
    assert all(parsed(event)["usage"] is None for event in found if event)
    assert end.endswith(DONE)
    usage = parsed(end.removesuffix(DONE))
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 2 + 3
    found, end = chunks_of(ChatChunks)
    assert all("usage" not in parsed(event) for event in found if event)
    assert end == DONE


def test_an_error_is_an_event():
    error = RequestRejected("no\nluck", kind=Rejection.WORKERS_FAILED, code="attempts_failed")
    event = parsed(ChatChunks(ENVELOPE, 1, include_usage=False).failed(error))
    assert event == {
        "error": {"message": "no\nluck", "type": "server_error", "param": None, "code": "attempts_failed"}
    }
