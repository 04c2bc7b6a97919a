"""Streams that have nothing to send for long: comments keep them open."""

import asyncio
import json
import re

import pytest

from penstock.errors import ModelReplaced, Rejection, RequestRejected
from penstock.shapes import Delta, FinishReason

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
MESSAGE = {**CHAT, "max_tokens": 5}
TEXT = {"model": "tiny", "prompt": "Hi", "stream": True}
BODIES = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT, "/v1/messages": MESSAGE}
COMMENT = ": keep-alive"
SLOW = {"step_s": 0.4, "sse_keep_alive_s": 0.1}
FAST = {"step_s": 0.01, "sse_keep_alive_s": 5.0}


def events_of(text):
    return [event for event in text.split("\n\n") if event]


@pytest.mark.parametrize("path", BODIES)
async def test_a_long_prefill_has_its_headers_and_comments_before_its_first_token(serve_script, path):
    async with serve_script("Hi", **SLOW) as served:
        events = events_of((await served.http.post(path, json=BODIES[path])).text)
    assert events[0] == COMMENT
    assert [event for event in events if event != COMMENT]


async def test_a_pause_between_tokens_has_comments_too(serve_script):
    async with serve_script("Hello there", **SLOW) as served:
        text = (await served.http.post("/v1/completions", json=TEXT)).text
    assert re.search(r"data: .*\n\n(: keep-alive\n\n)+data: ", text)
    assert text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("settings", [FAST, {**SLOW, "sse_keep_alive_s": 0.0}], ids=["quick", "off"])
async def test_a_quick_stream_has_no_comments(serve_script, settings):
    async with serve_script("Hi", **settings) as served:
        assert COMMENT not in (await served.http.post("/v1/completions", json=TEXT)).text


async def test_a_quick_failure_keeps_its_status_and_a_late_one_is_an_event(serve_script):
    failure = RequestRejected("no worker", kind=Rejection.UNAVAILABLE, code="no_worker")
    async with serve_script(lambda request: [failure], **FAST) as served:
        assert (await served.http.post("/v1/completions", json=TEXT)).status_code == 503
    async with serve_script(lambda request: [failure], **SLOW) as served:
        response = await served.http.post("/v1/completions", json=TEXT)
    *comments, last = events_of(response.text)
    assert (response.status_code, set(comments)) == (200, {COMMENT})
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "no_worker"


async def test_a_call_whose_response_has_only_begun_can_begin_again_with_another_revision(
    serve_script, view
):
    scripts = iter([[ModelReplaced("replaced")], [Delta([40], finish_reason=FinishReason.STOP)]])
    async with serve_script(lambda request: next(scripts), **SLOW) as served:
        text = (await served.http.post("/v1/completions", json=TEXT)).text
    assert "error" not in text
    assert text.endswith("data: [DONE]\n\n")


async def test_a_client_that_leaves_in_the_silence_cancels_its_request(serve_script):
    async with serve_script("Hi", step_s=30.0, sse_keep_alive_s=0.1) as served:
        async with served.http.stream("POST", "/v1/completions", json=TEXT) as response:
            assert response.status_code == 200
        async with asyncio.timeout(5):
            while not served.completer.cancelled:
                await asyncio.sleep(0.01)
