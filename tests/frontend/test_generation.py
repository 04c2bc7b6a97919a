"""Both endpoints over a real server, with the official client."""

import asyncio
import json
from functools import partial

import openai
import pytest

from penstock.errors import Rejection, RemoteError, RequestRejected
from penstock.frontend.generation import CallRecord
from penstock.shapes import Delta, FinishReason, TokenLogprob
from tests.waiting import until

HI = [{"role": "user", "content": "Hi"}]
ANSWER = "Hello, 你好 😀!"


def chat(served, **fields):
    return served.client.chat.completions.create(**{"model": "tiny", "messages": HI, **fields})


def complete(served, **fields):
    return served.client.completions.create(**{"model": "tiny", "prompt": "My name is", **fields})


async def collect(stream):
    return [chunk async for chunk in stream]


def text_of(chunks, index=0):
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content if hasattr(choice, "delta") else choice.text for choice in choices)


# --- whole answers --------------------------------------------------------------------------------


async def test_a_chat_completion(served, byte_level):
    answer = await chat(served, messages=[{"role": "system", "content": "Be kind."}, *HI])
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "tiny"
    assert answer.system_fingerprint.startswith("fp_")
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", ANSWER)
    assert (choice.finish_reason, choice.logprobs) == ("length", None)
    (request,) = served.completer.requests
    prompt = (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert request.token_ids == byte_level.encode(prompt).ids
    usage = answer.usage
    assert usage.prompt_tokens == len(request.token_ids)
    assert usage.completion_tokens == len(byte_level.encode(ANSWER).ids)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert served.completer.cancelled == []


async def test_a_text_completion(served, byte_level):
    answer = await complete(served, max_tokens=50)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (ANSWER, "length")
    assert served.completer.requests[0].token_ids == byte_level.encode("My name is").ids


async def test_every_kind_of_prompt_and_several_choices(serve_script, byte_level, deltas):
    def script(request):
        return deltas(byte_level.encode(f"{request.token_ids[0]} {request.sampling.seed}").ids)

    async with serve_script(script) as served:
        answer = await complete(served, prompt=[[5, 6, 7], [9]], n=2, seed=42)
        texts = [choice.text for choice in answer.choices]
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert texts[0] == "5 42"
        assert texts[2] == "9 42"
        assert texts[1].split()[1] == texts[3].split()[1] != "42"
        assert answer.usage.prompt_tokens == 4
        for prompt, first in (("a b", [["a b"]]), (["a", "b"], [["a"], ["b"]]), ([5, 6], None)):
            served.completer.requests.clear()
            await complete(served, prompt=prompt)
            expected = [byte_level.encode(text).ids for (text,) in first] if first else [[5, 6]]
            assert [request.token_ids for request in served.completer.requests] == expected
        assert len({request.request_id for request in served.completer.requests}) == 1


async def test_cached_tokens_are_reported_once_per_prompt(serve_script, deltas):
    async with serve_script(lambda request: deltas([40], cached=3)) as served:
        answer = await complete(served, prompt=[[1, 2, 3, 4], [5, 6, 7, 8]], n=2)
        assert answer.usage.prompt_tokens_details.cached_tokens == 6


async def test_what_the_router_is_told(served):
    await chat(
        served,
        temperature=0.5,
        seed=7,
        max_tokens=9,
        extra_body={"cache_salt": "s", "priority": -3, "top_k": 4},
    )
    (request,) = served.completer.requests
    assert (request.model.name, request.cache_salt, request.priority) == ("tiny", "s", -3)
    sampling = request.sampling
    assert (sampling.temperature, sampling.seed, sampling.max_tokens, sampling.top_k) == (0.5, 7, 9, 4)


async def test_bad_words_reach_the_engine_as_tokens_and_allowed_tokens_as_they_are(served, byte_level):
    await chat(served, extra_body={"bad_words": ["Hello"], "allowed_token_ids": [3, 5]})
    sampling = served.completer.requests[0].sampling
    assert sampling.bad_words[0] == tuple(byte_level.encode("Hello").ids)
    assert sampling.allowed_token_ids == (3, 5)
    for field, value in (("allowed_token_ids", [10**6]), ("allowed_token_ids", []), ("bad_words", [""])):
        response = await served.http.post(
            "/v1/completions", json={"model": "tiny", "prompt": "Hi", field: value}
        )
        assert response.status_code == 400
        assert response.json()["error"]["param"].startswith(field)


# --- streams --------------------------------------------------------------------------------------


async def test_a_chat_stream(served):
    chunks = await collect(await chat(served, stream=True))
    assert text_of(chunks) == ANSWER
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "length"]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


async def test_a_text_stream_of_several_prompts(serve_script, saying):
    async with serve_script(saying("One two.")) as served:
        chunks = await collect(await complete(served, prompt=["a", "b"], n=2, stream=True))
        assert [text_of(chunks, index) for index in range(4)] == ["One two."] * 4
        finishes = [choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason]
        assert sorted(finishes) == [0, 1, 2, 3]


async def test_usage_in_a_stream(served):
    options = {"include_usage": True}
    response = await served.http.post(
        "/v1/chat/completions",
        json={"model": "tiny", "messages": HI, "stream": True, "stream_options": options},
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, empty = response.text.split("\n\n")
    assert (done, empty) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    whole = await chat(served)
    assert chunks[-1]["usage"]["completion_tokens"] == whole.usage.completion_tokens


async def test_a_step_of_many_tokens_is_one_chunk(serve_script, saying):
    async with serve_script(saying("One two three four five.", per_step=100)) as served:
        chunks = await collect(await chat(served, stream=True))
        assert [chunk.choices[0].delta.content for chunk in chunks] == ["One two three four five."]


# --- stopping -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("include", "expected"), [(False, "One two "), (True, "One two three")])
async def test_a_stop_string_ends_the_answer_and_the_engine(serve_script, stream, include, expected):
    async with serve_script("One two three four five.", step_s=0.005) as served:
        options = {"include_stop_str_in_output": include}
        answer = await chat(served, stop=["zzz", "three"], stream=stream, extra_body=options)
        if stream:
            chunks = await collect(answer)
            assert text_of(chunks) == expected
            assert chunks[-1].choices[0].finish_reason == "stop"
        else:
            assert answer.choices[0].message.content == expected
            assert answer.choices[0].finish_reason == "stop"
        (request,) = served.completer.requests
        assert served.completer.cancelled == [request.request_id]


async def test_a_stop_string_ends_one_choice_of_several(serve_script, byte_level, deltas):
    texts = iter(["One stop two", "One two three four"])
    async with serve_script(lambda request: deltas(byte_level.encode(next(texts)).ids)) as served:
        chunks = await collect(await chat(served, n=2, stop="stop", stream=True))
        assert [text_of(chunks, index) for index in (0, 1)] == ["One ", "One two three four"]
        assert served.completer.cancelled == [served.completer.requests[0].request_id]


async def test_no_stop_string_counts_before_min_tokens(serve_script, byte_level):
    text = "a stop b stop c"
    tokens = len(byte_level.encode("a stop b").ids)
    async with serve_script(text) as served:
        answer = await chat(served, stop="stop", max_tokens=100, extra_body={"min_tokens": tokens})
        assert answer.choices[0].message.content == "a stop b "


@pytest.mark.parametrize("finish", [FinishReason.STOP, FinishReason.LENGTH])
async def test_a_stop_token_has_no_text(serve_script, byte_level, deltas, finish):
    ids = byte_level.encode("Hello!").ids
    stop_token = ids[-1]
    async with serve_script(lambda request: deltas(ids, finish=finish)) as served:
        answer = await chat(served, extra_body={"stop_token_ids": [stop_token]})
        expected = "Hello" if finish is FinishReason.STOP else "Hello!"
        assert answer.choices[0].message.content == expected
        assert answer.usage.completion_tokens == len(ids)


# --- log-probabilities ----------------------------------------------------------------------------


def with_logprobs(token_ids):
    found = [Delta([i], [TokenLogprob(i, -0.5, [(i, -0.5), (i + 1, float("-inf"))])]) for i in token_ids]
    found[-1].finish_reason = FinishReason.LENGTH
    return found


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_logprobs_name_the_bytes_of_each_token(serve_script, byte_level, stream):
    ids = byte_level.encode("Hi 😺").ids
    async with serve_script(lambda request: with_logprobs(ids)) as served:
        answer = await chat(served, logprobs=True, top_logprobs=2, stream=stream)
        assert served.completer.requests[0].sampling.logprobs == 2
        choices = [c.choices[0] for c in await collect(answer)] if stream else [answer.choices[0]]
        entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
        assert bytes(byte for entry in entries for byte in entry.bytes).decode() == "Hi 😺"
        assert len(entries) == len(ids)
        assert entries[0].logprob == -0.5
        assert [top.logprob for top in entries[0].top_logprobs] == [-0.5, -9999.0]


async def test_completion_logprobs_are_lists(serve_script, byte_level):
    ids = byte_level.encode("Hi 😺!").ids
    async with serve_script(lambda request: with_logprobs(ids)) as served:
        answer = await complete(served, logprobs=1)
        logprobs = answer.choices[0].logprobs
        assert logprobs.token_logprobs == [-0.5] * len(ids)
        assert logprobs.tokens[0] == "H"
        assert any(token.startswith("bytes:\\x") for token in logprobs.tokens)
        assert logprobs.text_offset[:2] == [0, 1]
        assert set(logprobs.top_logprobs[0]) == {"H"}


# --- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "raised"),
    [
        (
            RequestRejected("no worker", kind=Rejection.UNAVAILABLE, code="no_worker", retry_after_s=4.6),
            503,
            openai.InternalServerError,
        ),
        (RequestRejected("full", kind=Rejection.OVERLOADED, retry_after_s=0.2), 429, openai.RateLimitError),
        (RequestRejected("late", kind=Rejection.TIMED_OUT), 504, openai.InternalServerError),
        (RemoteError("broken"), 502, openai.InternalServerError),
    ],
)
async def test_a_failure_before_the_first_token_has_its_status(serve_script, stream, error, status, raised):
    async with serve_script(lambda request: [error]) as served:
        with pytest.raises(raised) as caught:
            await chat(served, stream=stream)
        response = caught.value.response
        assert response.status_code == status
        assert response.json()["error"]["message"] == str(error)
        retry = getattr(error, "retry_after_s", None)
        assert response.headers.get("retry-after") == ({4.6: "5", 0.2: "1"}[retry] if retry else None)


async def test_a_failure_in_a_stream_is_an_event(serve_script, byte_level):
    ids = byte_level.encode("Hi").ids
    error = RequestRejected("4 attempts failed", kind=Rejection.WORKERS_FAILED, code="attempts_failed")
    async with serve_script(lambda request: [Delta(ids), error]) as served:
        with pytest.raises(openai.APIError, match="4 attempts failed"):
            await collect(await chat(served, stream=True))
        body = {"model": "tiny", "messages": HI, "stream": True}
        response = await served.http.post("/v1/chat/completions", json=body)
        assert response.status_code == 200
        assert "Hi" in response.text
        assert "[DONE]" not in response.text


async def test_one_choices_failure_cancels_the_others(serve_script, byte_level, deltas):
    scripts = iter(
        [
            [RequestRejected("no", kind=Rejection.UNAVAILABLE, code="no_worker")],
            deltas(byte_level.encode("a" * 99).ids),
        ]
    )
    async with serve_script(lambda request: next(scripts), step_s=0.01) as served:
        with pytest.raises(openai.InternalServerError):
            await chat(served, n=2)
        assert served.completer.cancelled == [served.completer.requests[1].request_id]


async def test_a_router_that_takes_nothing(served):
    served.completer.submit_error = RequestRejected("full", kind=Rejection.OVERLOADED, retry_after_s=1.0)
    with pytest.raises(openai.RateLimitError):
        await chat(served)
    with pytest.raises(openai.RateLimitError):
        await chat(served, stream=True)


async def test_models_that_are_not_there(served):
    with pytest.raises(openai.NotFoundError) as caught:
        await chat(served, model="other")
    assert caught.value.body["code"] == "model_not_found"
    assert caught.value.body["param"] == "model"
    served.completer.serving = False
    with pytest.raises(openai.InternalServerError) as caught:
        await chat(served)
    assert caught.value.response.headers["retry-after"] == "5"


async def test_a_prompt_longer_than_the_context(served):
    with pytest.raises(openai.BadRequestError) as caught:
        await complete(served, prompt=[1] * 2048)
    assert caught.value.body["code"] == "context_length_exceeded"
    assert caught.value.body["message"].count("2048") == 2
    text = "x" * 2048 * 17
    asked = partial(complete, prompt=text), partial(chat, messages=[{"role": "user", "content": text}])
    for ask in asked:
        with pytest.raises(openai.BadRequestError, match="characters, more than 32768") as caught:
            await ask(served)
        assert caught.value.body["code"] == "context_length_exceeded"
    for field in ("max_tokens", "max_completion_tokens"):
        with pytest.raises(openai.BadRequestError, match=f"`{field}` is 2049, more than") as caught:
            await chat(served, **{field: 2049})
        assert caught.value.body["param"] == field
    assert served.completer.requests == []


async def test_an_answer_is_cut_to_what_is_left_of_the_context(served):
    """Agents ask for the same `max_tokens` however long their conversation has become."""
    await complete(served, prompt=[1] * 2000, max_tokens=2048)
    await complete(served, prompt=[1] * 2040)  # 16 by default
    await complete(served, prompt=[1] * 2000, max_tokens=48)
    await chat(served, max_tokens=7, max_completion_tokens=2048)
    prompts = [len(request.token_ids) for request in served.completer.requests]
    assert [request.sampling.max_tokens for request in served.completer.requests] == [
        48,
        8,
        48,
        2048 - prompts[3],
    ]


async def test_too_many_prompt_tokens_of_all_choices(serve_script, view_of, byte_level):
    view = view_of(byte_level, max_model_len=50_000)
    async with serve_script("x", views=[view]) as served:
        with pytest.raises(openai.BadRequestError, match="have 4200000 prompt tokens") as caught:
            await complete(served, prompt=[1] * 42_000, n=100)
        assert caught.value.body["param"] == "n"
        assert served.completer.requests == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": [100_000]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ],
)
async def test_what_is_wrong_only_for_this_model(served, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        await complete(served, **fields)
    assert caught.value.body["param"] == param


async def test_a_template_says_what_it_does_not_like(serve_script, view_of, byte_level):
    view = view_of(byte_level, template="{{ raise_exception('no system role here') }}")
    async with serve_script("x", views=[view]) as served:
        with pytest.raises(openai.BadRequestError, match="no system role here"):
            await chat(served)


# --- clients that leave ---------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_all_its_choices(serve_script, stream):
    async with serve_script("word " * 400, step_s=0.02) as served:
        task = asyncio.ensure_future(chat(served, n=3, stream=stream))
        await until(lambda: len(served.completer.requests) == 3)
        if stream:
            response = await task
            await anext(aiter(response))
            await response.close()
        else:
            task.cancel()
        await until(lambda: len(served.completer.cancelled) == 3)
        await until(lambda: b'status="499"} 1.0' in served.metrics.render())
        assert b'penstock_inflight_requests{model="tiny"} 0.0' in served.metrics.render()
        assert b'penstock_queued_requests{model="tiny"} 0.0' in served.metrics.render()


# --- what is counted ------------------------------------------------------------------------------


async def test_the_log_line_names_the_request_as_client_and_router_do(served, caplog):
    caplog.set_level("INFO", "penstock.frontend")
    answer = await chat(served, n=2, extra_headers={"x-request-id": "mine-1"})
    await served.http.get("/metrics")  # by then it is written
    (line,) = [record.getMessage() for record in caplog.records if "request_id=" in record.getMessage()]
    assert line.startswith(
        f"request_id=mine-1 id={answer.id} endpoint=chat_completions model=tiny status=200"
        " outcome=ok prompt="
    )
    assert [request.request_id for request in served.completer.requests] == [
        f"{answer.id}-0",
        f"{answer.id}-1",
    ]


async def test_metrics_and_the_log_line(served, caplog):
    caplog.set_level("INFO", "penstock.frontend")
    answer = await chat(served, stream=False, extra_headers={"x-request-id": "mine-1"})
    text = (await served.http.get("/metrics")).text
    labels = 'endpoint="chat_completions",model="tiny",outcome="ok",status="200"'
    assert f"penstock_requests_total{{{labels}}} 1.0" in text
    assert 'penstock_time_to_first_token_seconds_count{model="tiny"} 1.0' in text
    assert 'penstock_request_duration_seconds_count{model="tiny"} 1.0' in text
    between = answer.usage.completion_tokens - 1
    assert f'penstock_inter_token_latency_seconds_count{{model="tiny"}} {between}' in text
    assert f'penstock_prompt_tokens_total{{model="tiny"}} {float(answer.usage.prompt_tokens)}' in text
    assert f'penstock_output_tokens_total{{model="tiny"}} {float(answer.usage.completion_tokens)}' in text
    assert 'penstock_inflight_requests{model="tiny"} 0.0' in text
    (line,) = [record.getMessage() for record in caplog.records if "request_id=" in record.getMessage()]
    assert line.startswith(f"request_id=mine-1 id={answer.id} ")
    assert line.endswith(" finish=length")
    with pytest.raises(openai.NotFoundError):
        await chat(served, model="made-up-name")
    text = (await served.http.get("/metrics")).text
    assert 'model="",outcome="rejected",status="404"' in text
    assert "made-up-name" not in text


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (
            RequestRejected("Between two tokens.", kind=Rejection.TIMED_OUT, code="stall_timeout"),
            "stall_timeout",
        ),
        (RemoteError("its worker said so"), "worker_failed"),
    ],
)
async def test_a_stream_that_fails_after_its_first_token_is_counted_as_failed(
    serve_script, deltas, caplog, error, code
):
    caplog.set_level("INFO", "penstock.frontend")
    script = lambda request: [Delta([40]), error]  # noqa: E731
    async with serve_script(script, step_s=0.02) as served:
        response = await served.http.post(
            "/v1/chat/completions", json={"model": "tiny", "messages": HI, "stream": True}
        )
        assert response.status_code == 200
        last = json.loads(response.text.strip().rpartition("data: ")[2])
        assert last["error"]["code"] == code
        text = (await served.http.get("/metrics")).text
        labels = 'endpoint="chat_completions",model="tiny",outcome="failed",status="200"'
        assert f"penstock_requests_total{{{labels}}} 1.0" in text
        (line,) = [record.getMessage() for record in caplog.records if "request_id=" in record.getMessage()]
        assert " status=200 outcome=failed " in line
        assert line.endswith(f" finish={code} tenant=- error={str(error)!r}")


async def test_a_client_that_leaves_is_counted_as_cancelled(serve_script):
    async with serve_script("One two three four", step_s=0.05) as served:
        stream = await chat(served, stream=True)
        await anext(aiter(stream))
        await stream.close()
        labels = b'endpoint="chat_completions",model="tiny",outcome="cancelled",status="499"} 1.0'
        await until(lambda: labels in served.metrics.render())


async def test_a_call_that_is_failed_while_its_time_runs_out_ends_once() -> None:
    """Its timeout is expiring, and cannot be moved any more; those after it must still be told."""
    record = CallRecord(0.0, "")

    async def run_out() -> None:
        async with asyncio.timeout(0.01) as record.limit:
            try:
                await asyncio.sleep(5)
            finally:
                record.fail(RequestRejected("leaving", kind=Rejection.UNAVAILABLE))
                record.hang_up()

    with pytest.raises(TimeoutError):
        await run_out()
    assert record.error is None
