"""Anthropic's Messages API, as its official client finds it: whole messages, events, counts and errors."""

import asyncio
import contextlib

import anthropic
import httpx2
import pytest
from anthropic import types
from pydantic import TypeAdapter

from penstock.errors import Rejection, RemoteError, RequestRejected
from penstock.shapes import Delta, FinishReason, Parsed, ToolCallDelta
from tests.frontend.named_events import named_events
from tests.frontend.tag_parsers import TagParsers

HI = [{"role": "user", "content": "Hi"}]
BODY = {"model": "tiny", "max_tokens": 9, "messages": HI}
TOOLS = [{"name": "get", "input_schema": {"type": "object"}}]
CALL = '<tool_call>{"name": "get", "arguments": {"city": "%s"}}</tool_call>'
OFF = {"type": "disabled"}
STRICT = {"strict": True}

EVENTS = TypeAdapter(types.RawMessageStreamEvent)


@contextlib.asynccontextmanager
async def client_of(served):
    async with httpx2.AsyncClient(verify=False, trust_env=False) as http:
        yield anthropic.AsyncAnthropic(
            base_url=served.url, api_key="k", max_retries=0, timeout=10.0, http_client=http
        )


@pytest.fixture
def model(byte_level, view_of):
    return view_of(byte_level, structured_output=True, tool_parser="tags", reasoning_parser="tags")


@pytest.fixture
def ask(serve_script, saying, model):
    """The whole message, and the one that the events add up to, of a model with parsers."""

    async def ask(text, *, finish=FinishReason.STOP, stream, **fields):
        script = saying(text, finish=finish, cached=4)
        async with serve_script(script, views=[model], parsers=TagParsers()) as served:
            answer = await served.http.post("/v1/messages", json={**BODY, **fields, "stream": stream})
            assert answer.status_code == 200, answer.text
            if not stream:
                return types.Message.model_validate(answer.json(), **STRICT), answer
            events_of(answer.text)
            async with client_of(served) as client, client.messages.stream(**{**BODY, **fields}) as events:
                return await events.get_final_message(), answer

    return ask


def events_of(text):
    """The events as the official client's types, in an order that Anthropic gives them."""
    raw = named_events(text)
    assert [event["type"] for event in raw[:2]] == ["message_start", "ping"]
    events = [EVENTS.validate_python(event, **STRICT) for event in raw if event["type"] != "ping"]
    assert [event.type for event in events[-2:]] == ["message_delta", "message_stop"]
    opened, blocks = None, 0
    for event in events[1:-2]:
        if event.type == "content_block_start":
            assert (opened, event.index) == (None, blocks)
            opened, blocks = event.index, blocks + 1
        elif event.type == "content_block_stop":
            assert event.index == opened
            opened = None
        else:
            assert (event.type, event.index) == ("content_block_delta", opened)
    assert opened is None
    assert blocks > 0
    return events


def contents(message):
    shown = []
    for block in message.content:
        value = {"text": "text", "thinking": "thinking", "tool_use": "input"}[block.type]
        shown.append((block.type, getattr(block, value)))
    return shown


both = pytest.mark.parametrize("stream", [False, True])


# --- messages -------------------------------------------------------------------------------------


@both
async def test_thinking_text_and_calls_are_blocks(ask, stream):
    text = "I look.</think>Let me see." + CALL % "Paris" + CALL % "Rome"
    message, answer = await ask(text, stream=stream, tools=TOOLS)
    assert contents(message) == [
        ("thinking", "I look."),
        ("text", "Let me see."),
        ("tool_use", {"city": "Paris"}),
        ("tool_use", {"city": "Rome"}),
    ]
    assert (message.stop_reason, message.stop_sequence) == ("tool_use", None)
    assert message.id.startswith("msg_")
    assert message.content[0].signature
    assert message.content[2].id != message.content[3].id
    assert (message.role, message.model) == ("assistant", "tiny")
    assert answer.headers["request-id"] == answer.headers["x-request-id"]


@both
async def test_usage_counts_what_was_not_cached(ask, stream):
    message, _ = await ask("I look.</think>Hello", stream=stream)
    usage = message.usage
    assert (usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (4, 0)
    plain, _ = await ask("Hello", stream=stream, thinking=OFF)
    assert usage.output_tokens > plain.usage.output_tokens > 0
    assert 0 < usage.output_tokens_details.thinking_tokens < usage.output_tokens
    assert plain.usage.output_tokens_details.thinking_tokens == 0
    assert usage.input_tokens > 0


@both
@pytest.mark.parametrize(
    ("fields", "finish", "reason", "sequence", "expected"),
    [
        ({}, FinishReason.STOP, "end_turn", None, "Hello, you."),
        ({}, FinishReason.LENGTH, "max_tokens", None, "Hello, you."),
        ({"stop_sequences": ["you", "x"]}, FinishReason.LENGTH, "stop_sequence", "you", "Hello, "),
    ],
)
async def test_why_an_answer_ends(ask, stream, fields, finish, reason, sequence, expected):
    message, _ = await ask("Hello, you.", finish=finish, stream=stream, thinking=OFF, **fields)
    assert (message.stop_reason, message.stop_sequence) == (reason, sequence)
    assert contents(message) == [("text", expected)]


@both
async def test_a_call_in_an_answer_that_was_cut_is_not_to_be_run(ask, stream):
    message, _ = await ask(
        CALL % "Paris" + "so", finish=FinishReason.LENGTH, stream=stream, thinking=OFF, tools=TOOLS
    )
    assert message.stop_reason == "max_tokens"


@both
async def test_an_empty_answer_has_a_block(ask, stream):
    message, _ = await ask("<|im_end|>", stream=stream, thinking=OFF)
    assert contents(message) == [("text", "")]
    assert message.stop_reason == "end_turn"


@both
async def test_thinking_that_is_not_to_be_shown_keeps_its_signature(ask, stream):
    thinking = {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}
    message, _ = await ask("I look.</think>Hello", stream=stream, thinking=thinking)
    assert contents(message) == [("thinking", ""), ("text", "Hello")]
    assert message.content[0].signature


@both
async def test_a_message_may_be_sent_back_as_it_came(ask, stream):
    text = "I look.</think>Let me see." + CALL % "Paris"
    message, _ = await ask(text, stream=stream, tools=TOOLS)
    result = {"type": "tool_result", "tool_use_id": message.content[2].id, "content": "sunny"}
    back = [
        *HI,
        {"role": "assistant", "content": [block.model_dump() for block in message.content]},
        {"role": "user", "content": [result]},
    ]
    following, _ = await ask("</think>It is sunny.", stream=stream, tools=TOOLS, messages=back)
    assert contents(following)[-1] == ("text", "It is sunny.")


@both
async def test_the_parsers_are_told_what_was_chosen(serve_script, saying, model, stream):
    choice = {"type": "any", "disable_parallel_tool_use": True}
    script = saying("</think>" + CALL % "Paris" + CALL % "Rome", finish=FinishReason.STOP)
    async with serve_script(script, views=[model], parsers=TagParsers()) as served:
        body = {**BODY, "tools": TOOLS, "tool_choice": choice, "stream": stream}
        answer = await served.http.post("/v1/messages", json=body)
        assert served.completer.requests[0].sampling.structured.spec == '{"type":"array"}'
        assert answer.text.count('"name":"get"') == 1
        assert '"stop_reason":"tool_use"' in answer.text


async def test_the_official_client_reads_a_stream(serve_script, saying, model):
    script = saying("I look.</think>Hello" + CALL % "Paris", finish=FinishReason.STOP)
    async with (
        serve_script(script, views=[model], parsers=TagParsers()) as served,
        client_of(served) as client,
        client.messages.stream(**BODY, tools=TOOLS) as stream,
    ):
        seen = [event.type async for event in stream]
        message = await stream.get_final_message()
    assert {"thinking", "signature", "text", "input_json"} < set(seen)
    assert contents(message) == [
        ("thinking", "I look."),
        ("text", "Hello"),
        ("tool_use", {"city": "Paris"}),
    ]


async def test_the_official_client_asks_a_model_without_parsers(served):
    async with client_of(served) as client:
        message = await client.messages.create(**BODY)
        assert contents(message) == [("text", "Hello, 你好 😀!")]
        assert message._request_id
        async with client.messages.stream(**BODY) as stream:
            texts = [text async for text in stream.text_stream]
        assert "".join(texts) == "Hello, 你好 😀!"


async def test_the_client_may_leave_a_stream(serve_script, saying):
    async with serve_script(saying("x" * 200), step_s=0.01) as served, client_of(served) as client:
        async with client.messages.stream(**BODY) as stream:
            assert (await anext(aiter(stream))).type == "message_start"
        for _ in range(100):
            if served.completer.cancelled:
                break
            await asyncio.sleep(0.02)
        assert served.completer.cancelled


async def test_a_final_message_of_the_assistant_is_continued(served, byte_level):
    prefilled = [*HI, {"role": "assistant", "content": "The answer is ("}]
    await served.http.post("/v1/messages", json=BODY | {"messages": prefilled})
    prompt = byte_level.decode(served.completer.requests[0].token_ids, skip_special_tokens=False)
    assert prompt.endswith("<|im_start|>assistant\nThe answer is (")


class Interrupting:
    """A parser that finds text within a call, and another call after it, whatever the model says."""

    skip_special_tokens = True

    def has(self, answering):
        return True

    def load(self, model):
        return self

    def begin(self, body):
        return self

    def structured(self, prompt_ids):
        return None

    def answer(self, prompt_ids):
        self._parts = [
            Parsed(tool_calls=[ToolCallDelta(0, "a", "get", '{"a":')]),
            Parsed("between"),
            Parsed(tool_calls=[ToolCallDelta(0, arguments=" 1}"), ToolCallDelta(1, "b", "get")]),
        ]
        return self

    def push(self, text, token_ids, *, finished):
        return self._parts.pop(0)

    def reasoning_tokens(self, token_ids):
        return 0


async def test_text_within_a_call_comes_after_it(serve_script, deltas, model):
    script = deltas([40, 41, 42], finish=FinishReason.STOP)
    async with serve_script(lambda request: script, views=[model], parsers=Interrupting()) as served:
        answer = await served.http.post("/v1/messages", json=BODY | {"tools": TOOLS, "stream": True})
    shown = [
        (event["type"].removeprefix("content_block_"), event["index"], *event.get("delta", {}).values())
        for event in named_events(answer.text)
        if "index" in event
    ]
    assert shown == [
        ("start", 0),
        ("delta", 0, "input_json_delta", '{"a":'),
        ("delta", 0, "input_json_delta", " 1}"),
        ("stop", 0),
        ("start", 1),
        ("delta", 1, "text_delta", "between"),
        ("stop", 1),
        ("start", 2),
        ("stop", 2),
    ]
    assert len(events_of(answer.text)) == 12


# --- counting, and the list of models -------------------------------------------------------------


async def test_the_count_is_that_of_the_prompt(served):
    body = {
        "model": "tiny",
        "system": [{"type": "text", "text": "You help."}],
        "messages": [*HI, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "你好"}],
    }
    async with client_of(served) as client:
        counted = await client.messages.count_tokens(**body)
        message = await client.messages.create(**body, max_tokens=9)
    usage = message.usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    assert counted.input_tokens == len(served.completer.requests[0].token_ids)
    metrics = (await served.http.get("/metrics")).text
    assert 'endpoint="count_tokens",model="tiny",outcome="ok",status="200"' in metrics


async def test_tools_count_without_a_parser_for_their_calls(served):
    async with client_of(served) as client:
        body = {"model": "tiny", "messages": HI}
        assert (await client.messages.count_tokens(**body, tools=TOOLS)).input_tokens > 0
        with pytest.raises(anthropic.BadRequestError, match="cannot call tools"):
            await client.messages.create(**BODY, tools=TOOLS)


async def test_the_official_client_lists_models(served):
    async with client_of(served) as client:
        models = [model async for model in client.models.list()]
        assert [(model.id, model.display_name, model.type) for model in models] == [
            ("tiny", "tiny", "model")
        ]
        assert (await client.models.retrieve("tiny")).created_at.year >= 2024
    page = (await served.http.get("/v1/models")).json()
    assert (page["object"], page["has_more"], page["first_id"], page["last_id"]) == (
        "list",
        False,
        "tiny",
        "tiny",
    )
    assert page["data"][0]["object"] == "model"


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "error", "shown"),
    [
        (Rejection.INVALID, anthropic.BadRequestError, "invalid_request_error"),
        (Rejection.NOT_FOUND, anthropic.NotFoundError, "not_found_error"),
        (Rejection.OVERLOADED, anthropic.RateLimitError, "rate_limit_error"),
        (Rejection.INTERNAL, anthropic.InternalServerError, "api_error"),
        (Rejection.WORKERS_FAILED, anthropic.InternalServerError, "api_error"),
        (Rejection.UNAVAILABLE, anthropic.InternalServerError, "overloaded_error"),
        (Rejection.TIMED_OUT, anthropic.InternalServerError, "timeout_error"),
    ],
)
async def test_errors_before_an_answer_are_anthropics(served, kind, error, shown):
    served.completer.submit_error = RequestRejected("so it is", kind=kind)
    async with client_of(served) as client:
        with pytest.raises(error) as raised:
            await client.messages.create(**BODY)
    assert raised.value.body == {
        "type": "error",
        "error": {"type": shown, "message": "so it is"},
        "request_id": raised.value.request_id,
    }
    assert raised.value.request_id


async def test_an_error_after_the_beginning_is_an_event(serve_script):
    script = [Delta([40]), RemoteError("the worker died")]
    async with serve_script(lambda request: script) as served:
        answer = await served.http.post("/v1/messages", json=BODY | {"stream": True})
        events = named_events(answer.text)
        assert events[-1] == {
            "type": "error",
            "error": {"type": "api_error", "message": "the worker died"},
            "request_id": answer.headers["request-id"],
        }
        assert "message_stop" not in answer.text
        async with client_of(served) as client:
            with pytest.raises(anthropic.APIStatusError, match="the worker died"):
                async with client.messages.stream(**BODY) as stream:
                    await stream.get_final_message()


async def test_a_wrong_field_is_named(served):
    async with client_of(served) as client:
        with pytest.raises(anthropic.BadRequestError, match=r"`messages\[0\].content\[0\].type`.*`image`"):
            await client.messages.create(
                **BODY | {"messages": [{"role": "user", "content": [{"type": "image"}]}]}
            )
        with pytest.raises(anthropic.BadRequestError, match=r"`thinking\.type` must be one of"):
            await client.messages.count_tokens(model="tiny", messages=HI, thinking={"type": "x"})
        format = {"type": "json_schema", "schema": {"type": "object"}}
        with pytest.raises(anthropic.BadRequestError, match=r"`output_config\.format`"):
            await client.messages.create(**BODY, output_config={"format": format})


async def test_max_tokens_beyond_the_whole_context_is_cut_to_what_is_left(served):
    async with client_of(served) as client:
        await client.messages.create(**BODY | {"max_tokens": 128_000})
    (request,) = served.completer.requests
    assert request.sampling.max_tokens == 2048 - len(request.token_ids)


async def test_a_tool_runner_sends_the_whole_conversation_once_its_thread_is_refused(serve_script):
    async with serve_script("hello") as served, client_of(served) as client:
        with pytest.raises(anthropic.BadRequestError, match="`thread` is not supported") as raised:
            await client.beta.messages.create(**BODY, thread={"type": "create"})
        assert raised.value.body["error"]["details"] == {"error_code": "thread_unsupported_request"}
        message = await client.beta.messages.tool_runner(**BODY, tools=[]).until_done()
        assert [block.text for block in message.content] == ["hello"]


async def test_paths_and_models_that_are_not_there_are_refused_in_anthropics_shape(served):
    async with client_of(served) as client:
        with pytest.raises(anthropic.NotFoundError, match="POST /v1/messages/batches") as raised:
            await client.post("/v1/messages/batches", body={}, cast_to=object)
        assert raised.value.type == "not_found_error"
        with pytest.raises(anthropic.NotFoundError) as raised:
            await client.models.retrieve("other")
        assert raised.value.type == "not_found_error"
    assert "type" not in (await served.http.get("/v1/other")).json()


async def test_the_clients_key_lets_it_in(serve_script):
    async with serve_script("x", api_key="k") as served, client_of(served) as client:
        assert contents(await client.messages.create(**BODY)) == [("text", "x")]
        assert (await client.messages.count_tokens(model="tiny", messages=HI)).input_tokens > 0
        assert [model.id async for model in client.models.list()] == ["tiny"]
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            answer = await served.http.post(path, json=BODY)
            assert answer.status_code == 401
            assert answer.json()["error"]["type"] == "authentication_error"
            assert "x-api-key" in answer.json()["error"]["message"]
