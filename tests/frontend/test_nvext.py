"""Workers and timings in answers, for clients that ask as Dynamo's do."""

from __future__ import annotations

import json
import time

import pytest

ENDPOINTS = {
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"model": "tiny", "prompt": [5, 6]},
}
WORKERS = {"prefill_worker_id": "prefill-1", "decode_worker_id": "decode-1"}
TIMING = {"prefill_wait_time_ms": 2.0, "prefill_time_ms": 30.0, "ttft_ms": 32.0}


def asking(*fields: str, **more: object) -> dict[str, object]:
    return {"nvext": {"extra_fields": [*fields]}, **more}


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_an_answer_tells_its_workers_and_times_when_asked(served, path):
    before_ms = time.time() * 1e3
    answer = (await served.http.post(path, json=ENDPOINTS[path] | asking("worker_id", "timing"))).json()
    nvext = answer["nvext"]
    assert nvext["worker_id"] == WORKERS
    timing = nvext["timing"]
    assert TIMING.items() <= timing.items()
    assert timing["kv_hit_rate"] == 0
    assert before_ms - 1 <= timing["request_received_ms"] <= time.time() * 1e3
    assert 0 < timing["total_time_ms"] < 60_000


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("path", ENDPOINTS)
async def test_a_stream_tells_them_in_the_last_chunk_of_each_choice(served, path, usage):
    options = {"stream_options": {"include_usage": True}} if usage else {}
    body = ENDPOINTS[path] | asking("worker_id", stream=True, n=2, **options)
    events = (await served.http.post(path, json=body)).text.split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    told = [chunk for chunk in chunks if "nvext" in chunk]
    assert [chunk["nvext"] for chunk in told] == [{"worker_id": WORKERS}] * 2
    assert sorted(chunk["choices"][0]["index"] for chunk in told) == [0, 1]
    assert all(chunk["choices"][0]["finish_reason"] for chunk in told)


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("nothing", [{}, asking(), {"nvext": {"extra_fields": None}}])
async def test_an_answer_tells_nothing_unasked(served, path, nothing):
    assert "nvext" not in (await served.http.post(path, json=ENDPOINTS[path] | nothing)).text


async def test_a_field_that_answers_do_not_have_is_refused(served):
    path = "/v1/completions"
    response = await served.http.post(path, json=ENDPOINTS[path] | asking("worker_id", "routed_experts"))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "nvext.extra_fields[1]"
