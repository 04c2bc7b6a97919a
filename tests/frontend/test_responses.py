"""The Responses API, as its official client finds it: whole responses, events, what is stored, errors."""

import json

import msgspec
import pytest
from openai.types import responses
from pydantic import TypeAdapter

from penstock.errors import RemoteError, RequestRejected
from penstock.frontend.http.api_keys import key_line
from penstock.frontend.responses_api.request_body import (
    RESPONSES_REFUSED,
    ResponsesRequest,
    decode_response_request,
)
from penstock.frontend.responses_api.tool_names import offered_tools
from penstock.shapes import Delta, FinishReason, TokenLogprob
from tests.frontend.named_events import named_events
from tests.frontend.tag_parsers import TagParsers

BODY = {"model": "tiny", "input": "Hi"}
GET = {"type": "function", "name": "get", "parameters": {"type": "object"}}
PATCH = {"type": "custom", "name": "patch", "description": "Changes files."}
CALL = '<tool_call>{"name": "%s", "arguments": %s}</tool_call>'
STRICT = {"strict": True}
EVENTS = TypeAdapter(responses.ResponseStreamEvent)


def events_of(text):
    """The events as the official client's types, numbered from 0 on."""
    events = [EVENTS.validate_python(fields, **STRICT) for fields in named_events(text)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    return events


def types_of(events):
    return [event.type.removeprefix("response.") for event in events if not event.type.endswith(".delta")]


def prompt_of(served, tokenizer):
    return tokenizer.decode(served.completer.requests[-1].token_ids, skip_special_tokens=False)


async def create(served, **fields):
    answer = await served.http.post("/v1/responses", json={**BODY, **fields})
    assert answer.status_code == 200, answer.text
    return responses.Response.model_validate(answer.json(), **STRICT)


async def error_of(served, method="POST", path="/v1/responses", **fields):
    body = {"json": {**BODY, **fields}} if method == "POST" else {}
    answer = await served.http.request(method, path, **body)
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["param"], error["code"]


@pytest.fixture
def model(byte_level, view_of):
    return view_of(byte_level, structured_output=True, tool_parser="tags", reasoning_parser="tags")


@pytest.fixture
def serve_parsed(serve_script, saying, model):
    """A server of a model with parsers that says a text."""

    def start(text, *, finish=FinishReason.STOP, **options):
        script = saying(text, finish=finish, cached=4)
        return serve_script(script, views=[model], parsers=TagParsers(), **options)

    return start


async def both(served, **fields):
    """The whole response, and the one at the end of the same answer's events."""
    whole = await create(served, **fields)
    answer = await served.http.post("/v1/responses", json={**BODY, **fields, "stream": True})
    events = events_of(answer.text)
    return whole, events


async def test_input_tokens_are_those_that_an_answer_is_made_for(serve_parsed):
    fields = {"instructions": "Be brief.", "tools": [GET], "reasoning": {"effort": "low"}}
    async with serve_parsed("</think>Yes.") as served:
        first = await create(served, **fields)
        long = [{"role": "user", "content": text} for text in ("word " * 5000, "Hi")]
        for more in (
            {},
            {"previous_response_id": first.id},
            {"input": long, "truncation": "auto"},
        ):
            counted = await served.http.post("/v1/responses/input_tokens", json={**BODY, **fields, **more})
            count = responses.InputTokenCountResponse.model_validate(counted.json(), **STRICT)
            answered = await create(served, **fields, **more)
            assert count.input_tokens == answered.usage.input_tokens
        sdk = await served.client.responses.input_tokens.count(**{**BODY, **fields})
        assert sdk.input_tokens == first.usage.input_tokens
        path = "/v1/responses/input_tokens"
        assert await error_of(served, path=path, input=None) == (400, "input", "missing_field")


async def test_text_whole_and_streamed_is_one_message(served):
    whole, events = await both(served, max_output_tokens=9, metadata={"a": "b"}, instructions="Be brief.")
    (message,) = whole.output
    assert (whole.output_text, whole.status, message.status) == (
        "Hello, 你好 😀!",
        "incomplete",
        "incomplete",
    )
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert (whole.metadata, whole.instructions, whole.max_output_tokens) == ({"a": "b"}, "Be brief.", 9)
    assert types_of(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "incomplete",
    ]
    assert "".join(e.delta for e in events if e.type.endswith(".delta")) == whole.output_text
    last = events[-1].response
    assert (last.output_text, last.usage) == (whole.output_text, whole.usage)


async def test_reasoning_text_and_calls_are_items_in_their_order(serve_parsed):
    text = "Let me see.</think>One moment." + CALL % ("get", '{"city": "Rome"}')
    async with serve_parsed(text) as served:
        whole, events = await both(served, tools=[GET], include=["reasoning.encrypted_content"])
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
    reasoning, message, call = whole.output
    assert reasoning.content[0].text == "Let me see."
    assert reasoning.encrypted_content.startswith("penstock:")
    assert (message.content[0].text, call.name) == ("One moment.", "get")
    assert json.loads(call.arguments) == {"city": "Rome"}
    assert whole.usage.output_tokens_details.reasoning_tokens > 0
    assert whole.usage.input_tokens_details.cached_tokens == 4
    streamed = events[-1].response.output
    assert [item.type for item in streamed] == ["reasoning", "message", "function_call"]
    assert streamed[0].content[0].text == "Let me see."
    assert streamed[2].arguments == call.arguments
    assert types_of(events)[2:7] == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
    ]
    assert types_of(events)[12:] == [
        "output_item.added",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]


async def test_custom_tool_is_shown_as_a_function_of_its_input(serve_parsed):
    async with serve_parsed("</think>" + CALL % ("patch", '{"input": "*** Begin"}')) as served:
        whole, events = await both(served, tools=[PATCH])
    (call,) = whole.output
    assert (call.type, call.name, call.input) == ("custom_tool_call", "patch", "*** Begin")
    assert types_of(events)[2:5] == [
        "output_item.added",
        "custom_tool_call_input.done",
        "output_item.done",
    ]


@pytest.mark.parametrize(
    ("syntax", "definition", "key", "value"),
    [
        ("regex", "[a-z]+|0", "pattern", "^(?:[a-z]+|0)$"),
        (
            "lark",
            'start: "x"+',
            "description",
            'The whole input of the tool, as plain text. It follows this Lark grammar:\nstart: "x"+',
        ),
    ],
)
async def test_grammar_of_a_custom_tool_is_in_the_schema_and_a_pattern_is_strict(
    syntax, definition, key, value
):
    format = {"type": "grammar", "syntax": syntax, "definition": definition}
    body = msgspec.convert({**BODY, "tools": [{**PATCH, "format": format}]}, ResponsesRequest)
    (tool,) = offered_tools(body).tools
    assert tool.function.parameters["properties"]["input"][key] == value
    assert tool.function.strict is (True if key == "pattern" else None)


async def test_custom_call_of_another_form_is_given_as_written(serve_parsed):
    async with serve_parsed("</think>" + CALL % ("patch", '{"x": 1}')) as served:
        whole = await create(served, tools=[PATCH])
    assert json.loads(whole.output[0].input) == {"x": 1}


async def test_function_of_a_namespace_is_called_by_both_names(serve_parsed):
    tools = [{"type": "namespace", "name": "mail", "description": "d", "tools": [GET]}]
    async with serve_parsed("</think>" + CALL % ("mail__get", "{}")) as served:
        answer = await served.http.post("/v1/responses", json={**BODY, "tools": tools})
    (call,) = answer.json()["output"]
    assert (call["name"], call["namespace"]) == ("get", "mail")


async def test_answer_without_anything_is_an_empty_message(serve_script, deltas, byte_level):
    end = byte_level.token_to_id("<|im_end|>")
    async with serve_script(lambda request: deltas([end], finish=FinishReason.STOP)) as served:
        whole, events = await both(served)
    assert (whole.output_text, whole.status, len(whole.output)) == ("", "completed", 1)
    assert len(events[-1].response.output) == 1


async def test_logprobs_are_those_of_the_text_alone(model, byte_level, serve_script):
    token_ids = byte_level.encode("so</think>yes", add_special_tokens=False).ids

    def script(request):
        steps = [Delta([token], logprobs=[TokenLogprob(token, -0.5)]) for token in token_ids]
        steps[-1].finish_reason = FinishReason.STOP
        return steps

    async with serve_script(script, views=[model], parsers=TagParsers()) as served:
        fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 0}
        whole, events = await both(served, **fields)
    for response in (whole, events[-1].response):
        message = response.output[-1]
        assert "".join(entry.token for entry in message.content[0].logprobs) == "yes"


async def test_stream_that_fails_ends_with_a_failed_response(serve_script):
    async with serve_script(lambda request: [Delta([5]), RemoteError("the worker died")]) as served:
        answer = await served.http.post("/v1/responses", json={**BODY, "stream": True})
    last = events_of(answer.text)[-1]
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert last.response.error.code == "server_error"
    assert last.response.error.message == "the worker died"


# --- conversations --------------------------------------------------------------------------------


async def test_previous_response_brings_its_items_but_not_its_instructions(serve_script, byte_level):
    async with serve_script("Hello!") as served:
        first = await create(served, instructions="Be brief.", input="I am Bo.")
        second = await create(served, previous_response_id=first.id, input="And?")
        await create(served, previous_response_id=second.id, input=[{"role": "user", "content": "So?"}])
        prompt = prompt_of(served, byte_level)
    turns = [turn.split("<|im_end|>")[0] for turn in prompt.split("<|im_start|>")[1:]]
    assert turns == [
        "user\nI am Bo.",
        "assistant\nHello!",
        "user\nAnd?",
        "assistant\nHello!",
        "user\nSo?",
        "assistant\n",
    ]


async def test_reference_stands_for_the_stored_item(serve_script, byte_level):
    async with serve_script("Hello!") as served:
        first = await create(served)
        items = [{"id": first.output[0].id}, {"role": "user", "content": "And?"}]
        await create(served, input=items)
        assert "assistant\nHello!" in prompt_of(served, byte_level)
        status = await error_of(served, input=[{"type": "item_reference", "id": "msg_1"}])
        nameless = await error_of(served, input=[{"type": "item_reference"}])
    assert status == (400, "input[0].id", "item_not_found")
    assert nameless == (400, "input[0].id", "missing_field")


async def test_few_bytes_that_name_many_are_refused(serve_script, monkeypatch):
    monkeypatch.setattr("penstock.frontend.responses_api.create.MAX_CONVERSATION_BYTES", 20_000)
    async with serve_script("Hello!") as served:
        first = await create(served, input="x" * 1000)
        listed = await served.client.responses.input_items.list(first.id)
        items = [{"id": listed.data[0].id}] * 40
        assert await error_of(served, input=items) == (400, "input[15].id", "invalid_value")
        monkeypatch.setattr("penstock.frontend.responses_api.create.MAX_CONVERSATION_BYTES", 1000)
        status = await error_of(served, previous_response_id=first.id)
        assert status == (400, "previous_response_id", "invalid_value")


async def test_response_that_is_not_stored_cannot_be_continued(served):
    first = await create(served, store=False)
    expected = (400, "previous_response_id", "previous_response_not_found")
    assert await error_of(served, previous_response_id=first.id) == expected
    assert await error_of(served, "GET", f"/v1/responses/{first.id}") == (404, None, "not_found")


async def test_stored_response_is_retrieved_listed_and_deleted(served):
    made = await create(served, input=[{"role": "user", "content": text} for text in "abc"])
    client = served.client.responses
    assert (await client.retrieve(made.id)).output_text == made.output_text
    page = await client.input_items.list(made.id, limit=2)
    assert [item.content[0].text for item in page.data] == ["c", "b"]
    rest = await client.input_items.list(made.id, after=page.last_id, order="desc")
    assert ([item.content[0].text for item in rest.data], rest.has_more) == (["a"], False)
    path = f"/v1/responses/{made.id}"
    assert await error_of(served, "GET", f"{path}?stream=true") == (400, "stream", "unsupported_value")
    assert await error_of(served, "GET", f"{path}/input_items?limit=0") == (400, "limit", "invalid_value")
    assert await error_of(served, "GET", f"{path}/input_items?after=x") == (400, "after", "invalid_value")
    assert (await served.http.post(f"{path}/cancel")).status_code == 400
    await client.delete(made.id)
    assert await error_of(served, "GET", path) == (404, None, "not_found")
    assert await error_of(served, "DELETE", path) == (404, None, "not_found")


async def test_response_is_hidden_from_other_keys(serve_script, tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"{key_line('a', 'key-of-a' * 4)}\n{key_line('b', 'key-of-b' * 4)}\n")
    async with serve_script("x", api_keys_file=str(file)) as served:
        own, other = ({"authorization": f"Bearer {key * 4}"} for key in ("key-of-a", "key-of-b"))
        made = (await served.http.post("/v1/responses", json=BODY, headers=own)).json()["id"]
        path = f"/v1/responses/{made}"
        assert (await served.http.get(path, headers=other)).status_code == 404
        assert (await served.http.get(path)).status_code == 401
        assert (await served.http.get(path, headers=own)).status_code == 200


async def test_long_conversation_loses_its_beginning_only_when_asked(serve_script, byte_level):
    items = [{"role": "user", "content": f"turn {number} " + "word " * 100} for number in range(30)]
    async with serve_script("x") as served:
        assert (await error_of(served, input=items))[2] == "context_length_exceeded"
        made = await create(served, input=items, truncation="auto", instructions="Be brief.")
        prompt = prompt_of(served, byte_level)
    assert made.truncation == "auto"
    assert "Be brief." in prompt
    assert "turn 29 " in prompt
    assert "turn 0 " not in prompt


# --- wrong requests -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"type": "message", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"include": ["nonsense"]}, "include"),
        ({"previous_response_id": ""}, "previous_response_id"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"max_output_tokens": 5000}, "max_output_tokens"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [GET, GET]}, "tools[1].name"),
        ({"tools": [{**PATCH, "format": {"type": "ebnf"}}]}, "tools[0].format.type"),
        ({"tools": [{**PATCH, "format": {"type": "grammar"}}]}, "tools[0].format.definition"),
        (
            {"tools": [{**PATCH, "format": {"type": "grammar", "syntax": "gbnf", "definition": "x"}}]},
            "tools[0].format.syntax",
        ),
        ({"tools": [GET], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name"),
        ({"tools": [GET], "tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"tools": [GET], "tool_choice": {"type": "mcp"}}, "tool_choice.type"),
        ({"tools": [GET], "tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice.tools"),
    ],
)
async def test_wrong_field_is_named(served, fields, param):
    status, named, _ = await error_of(served, **fields)
    assert (status, named) == (400, param)
    assert served.completer.requests == []


@pytest.mark.parametrize(
    "kind",
    ["web_search", "file_search", "code_interpreter", "mcp", "image_generation", "computer", "local_shell"],
)
async def test_tool_that_runs_at_openai_is_refused_by_its_name(served, kind):
    answer = await served.http.post("/v1/responses", json={**BODY, "tools": [{"type": kind}]})
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("tools[0].type", "unsupported_value")
    assert f"`{kind}`" in error["message"]


async def test_search_in_what_openai_has_cached_is_left_out(served):
    made = await served.http.post(
        "/v1/responses", json={**BODY, "tools": [{"type": "web_search", "external_web_access": False}]}
    )
    assert made.status_code == 200


async def test_structured_output_is_asked_of_the_engine(serve_parsed):
    schema = {"type": "object"}
    async with serve_parsed("</think>{}") as served:
        text = {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}}
        made = await create(served, text=text)
    assert made.text.format.to_dict()["schema"] == schema
    assert made.output_text == "{}"


async def test_allowed_tools_are_the_only_ones(serve_parsed):
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "custom", "name": "patch"}]}
    call = '<tool_call>{"name": "get", "arguments": {}}</tool_call>'
    async with serve_parsed("</think>" + call) as served:
        made, events = await both(served, tools=[GET, PATCH], tool_choice=choice)
        free = await create(served, tools=[GET, PATCH])
    assert made.tool_choice.to_dict() == choice
    for shown in (made, events[-1].response):
        assert [item.type for item in shown.output if item.type != "reasoning"] == ["message"]
        assert shown.output_text == ""
    assert not [event for event in events if "arguments" in event.type]
    assert [item.type for item in free.output if item.type != "reasoning"] == ["function_call"]
    allowing, _, plain = served.completer.requests
    assert allowing.token_ids == plain.token_ids


@pytest.mark.parametrize("name", ["get", "mail__get"])
@pytest.mark.parametrize("called", ["get", "mail__get", "web__get"])
async def test_an_allowed_name_is_of_the_tool_itself_before_one_of_a_namespace(serve_parsed, name, called):
    mail = {"type": "namespace", "name": "mail", "description": "d", "tools": [GET]}
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": name}]}
    async with serve_parsed("</think>" + CALL % (called, "{}")) as served:
        tools = [mail, GET, {**mail, "name": "web"}]
        answer = await served.http.post(
            "/v1/responses", json={**BODY, "tools": tools, "tool_choice": choice}
        )
    (item,) = answer.json()["output"]
    assert item["type"] == ("function_call" if name == called else "message")


async def test_an_allowed_name_is_of_that_tool_in_every_namespace(serve_parsed):
    mail = {"type": "namespace", "name": "mail", "description": "d", "tools": [GET]}
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "get"}]}
    tools = [mail, {**mail, "name": "web"}, PATCH]
    async with serve_parsed("</think>" + CALL % ("web__get", "{}")) as served:
        answer = await served.http.post(
            "/v1/responses", json={**BODY, "tools": tools, "tool_choice": choice}
        )
    (call,) = answer.json()["output"]
    assert (call["name"], call["namespace"]) == ("get", "web")


# --- fields ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RESPONSES_REFUSED)
def test_refused_field_is_named_unless_it_asks_for_nothing(name):
    with pytest.raises(RequestRejected) as raised:
        decode_response_request(json.dumps({**BODY, name: {"x": 1}}).encode())
    assert (raised.value.field, raised.value.code) == (name, "unsupported_value")
    for nothing in (None, *RESPONSES_REFUSED[name].neutral):
        decode_response_request(json.dumps({**BODY, name: nothing}).encode())


def test_body_of_nulls_is_one_of_defaults():
    names = set(ResponsesRequest.__struct_fields__) - set(BODY)
    nulls = decode_response_request(json.dumps({**dict.fromkeys(names), **BODY}).encode())
    assert nulls == decode_response_request(json.dumps(BODY).encode())
