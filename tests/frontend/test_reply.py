"""Chat answers taken apart, as clients get them."""

import json
import re

import pytest

from penstock.core.events import REJECTED_BY_ENGINE
from penstock.errors import RequestRejected
from penstock.frontend.parsers.built_in import BuiltInParsers
from penstock.frontend.reply import Reply, ReplyRules
from penstock.shapes import Delta, FinishReason, Parsed, ToolCallDelta
from tests.frontend.tag_parsers import TagParsers

HI = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}]
CALL = '<tool_call>{"name": "get", "arguments": {"city": "Paris"}}</tool_call>'
PLAIN = {"chat_template_kwargs": {"enable_thinking": False}}


@pytest.fixture
def model(byte_level, view_of):
    return view_of(byte_level, structured_output=True, tool_parser="tags", reasoning_parser="tags")


@pytest.fixture
def ask(serve_script, saying, model):
    """An answer's message (or what its deltas add up to) and finish_reason, and the whole answer."""

    async def ask(text, *, finish=FinishReason.STOP, stream=False, **fields):
        script = saying(text, finish=finish)
        async with serve_script(script, views=[model], parsers=TagParsers()) as served:
            body = {"model": "tiny", "messages": HI, **fields}
            if not stream:
                response = await served.http.post("/v1/chat/completions", json=body)
                answer = response.json()
                if response.status_code != 200:
                    return answer, None, served.completer.requests
                choice = answer["choices"][0]
                return choice["message"], choice["finish_reason"], answer
            options = {"stream": True, "stream_options": {"include_usage": True}}
            response = await served.http.post("/v1/chat/completions", json=body | options)
            return joined(response.text)

    return ask


def joined(events):
    lines = [line.removeprefix("data: ") for line in events.splitlines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    assert [choice["delta"].get("role") for choice in choices] == ["assistant"] + [None] * (
        len(choices) - 1
    )
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    message = {"content": "", "reasoning": "", "tool_calls": []}
    for choice in choices:
        delta = choice["delta"]
        message["content"] += delta.get("content", "")
        message["reasoning"] += delta.get("reasoning", "")
        assert delta.get("reasoning_content") == delta.get("reasoning")
        message["tool_calls"] += delta.get("tool_calls", [])
    return message, choices[-1]["finish_reason"], chunks[-1]


@pytest.mark.parametrize("stream", [False, True])
async def test_reasoning_and_content_are_apart(ask, stream):
    message, finish, answer = await ask("hm, 12</think>It is 12.", stream=stream)
    assert (message["content"], message["reasoning"], finish) == ("It is 12.", "hm, 12", "stop")
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0


@pytest.mark.parametrize("stream", [False, True])
async def test_calls_have_a_finish_reason_of_their_own(ask, stream):
    message, finish, _ = await ask("hm</think>" + CALL, tools=TOOLS, stream=stream)
    (call,) = message["tool_calls"]
    assert (call["type"], call["function"]) == (
        "function",
        {"name": "get", "arguments": '{"city": "Paris"}'},
    )
    assert call["id"]
    assert call.get("index", 0) == 0
    assert (message["content"] or "", message["reasoning"], finish) == ("", "hm", "tool_calls")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "finish", "expected"),
    [
        (None, FinishReason.STOP, "tool_calls"),
        ("auto", FinishReason.STOP, "tool_calls"),
        ("required", FinishReason.STOP, "tool_calls"),
        ("required", FinishReason.LENGTH, "length"),
        ({"type": "function", "function": {"name": "get"}}, FinishReason.STOP, "stop"),
    ],
)
async def test_how_a_call_ends(ask, stream, choice, finish, expected):
    fields = {"tool_choice": choice} if choice else {}
    _, found, _ = await ask(CALL, finish=finish, tools=TOOLS, stream=stream, **PLAIN, **fields)
    assert found == expected


@pytest.mark.parametrize("cut", range(6, len(CALL), 8))
@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, CALL + "\n" + CALL),
        ({"tool_choice": "required"}, '[{"name": "get", "parameters": {"city": "Paris"}}]'),
        ({"tool_choice": {"type": "function", "function": {"name": "get"}}}, '{"city": "Paris"}'),
    ],
)
async def test_an_answer_that_was_cut_says_the_same_whole_and_streamed(
    serve_script, saying, byte_level, view_of, fields, text, cut
):
    model = view_of(byte_level, structured_output=True, tool_parser="hermes")
    script = saying(text[: len(text) * cut // len(CALL)], finish=FinishReason.LENGTH)
    body = {"model": "tiny", "messages": HI, "tools": TOOLS, **fields}
    async with serve_script(script, views=[model], parsers=BuiltInParsers()) as served:
        whole = (await served.http.post("/v1/chat/completions", json=body)).json()["choices"][0]
        options = {"stream": True, "stream_options": {"include_usage": True}}
        streamed = await served.http.post("/v1/chat/completions", json=body | options)
    message, finish, _ = joined(streamed.text)
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in added_up(message)]
    shown = whole["message"].get("tool_calls", [])
    assert calls == [(call["function"]["name"], call["function"]["arguments"]) for call in shown]
    assert (message["content"], finish) == (whole["message"]["content"] or "", "length")
    assert whole["finish_reason"] == finish


@pytest.mark.parametrize("stream", [False, True])
async def test_calls_have_ids_in_the_form_of_the_api(serve_script, saying, byte_level, view_of, stream):
    model = view_of(byte_level, tool_parser="hermes")
    shared = {"model": "tiny", "stream": stream}
    function = TOOLS[0]["function"]
    bodies = {
        "/v1/chat/completions": {"messages": HI, "tools": TOOLS},
        "/v1/responses": {"input": "Hi", "tools": [{"type": "function", **function}], "store": False},
        "/v1/messages": {
            "messages": HI,
            "max_tokens": 99,
            "tools": [{"name": "get", "input_schema": function["parameters"]}],
        },
    }
    async with serve_script(saying(CALL), views=[model], parsers=BuiltInParsers()) as served:
        texts = {
            path: (await served.http.post(path, json=shared | body)).text for path, body in bodies.items()
        }
    ids = {path: set(re.findall(r'"((?:call|toolu)_[0-9a-f]{24})"', text)) for path, text in texts.items()}
    assert [len(found) for found in ids.values()] == [1, 1, 1]
    prefixes = [next(iter(found)).partition("_")[0] for found in ids.values()]
    assert prefixes == ["call", "call", "toolu"]


def added_up(message):
    """The calls of a message that was streamed."""
    calls = {}
    for delta in message["tool_calls"]:
        call = calls.setdefault(delta["index"], {"function": {"name": "", "arguments": ""}})
        for name, text in delta["function"].items():
            call["function"][name] += text
    return list(calls.values())


async def test_an_answer_without_calls_ends_as_ever(ask):
    message, finish, _ = await ask("No.", tools=TOOLS, **PLAIN)
    assert (message["content"], finish, "tool_calls" in message) == ("No.", "stop", False)


@pytest.mark.parametrize("fields", [{}, {"tools": TOOLS}])
async def test_an_answer_without_anything_in_it_is_an_empty_text(ask, fields):
    message, _, _ = await ask("Hi", **PLAIN, stop="Hi", **fields)
    assert message["content"] == ""
    assert "tool_calls" not in message


def test_steps_that_are_taken_together_are_one_part_for_each_kind_of_text(model):
    parser = TagParsers().load(model).begin({"messages": HI, "tools": TOOLS})
    rules = ReplyRules(parser, stream=True, required=False, auto=True, show_tokens=True)
    reply = Reply(rules, [])
    steps = ["so", " it", "</think>", "It", " is", " 12", CALL]
    for number, text in enumerate(steps, 1):
        reply.add(text, [number], finished=number == len(steps))
    parts = [(part.reasoning, part.content, len(part.tool_calls)) for part in reply.take()]
    assert parts == [("so it", None, 0), (None, "It is 12", 0), (None, None, 1)]


def both_tools(**fields):
    tools = [*TOOLS, {"type": "function", "function": {"name": "put", "parameters": {"type": "object"}}}]
    return {"model": "tiny", "messages": HI, "tools": tools, **fields}


def allowing(name, mode="auto"):
    tools = [{"type": "function", "function": {"name": name}}]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("allowed", "finish", "calls"), [("get", "tool_calls", [(0, "Paris")]), ("put", "stop", [])]
)
async def test_calls_of_tools_that_are_not_allowed_are_left_out(ask, stream, allowed, finish, calls):
    put = CALL.replace("get", "remove")
    fields = both_tools(tool_choice=allowing(allowed), stream=stream, **PLAIN)
    message, found, _ = await ask(put + CALL + put, **fields)
    shown = message.get("tool_calls", [])
    assert found == finish
    assert [
        (call.get("index", 0), json.loads(call["function"]["arguments"])["city"]) for call in shown
    ] == calls


async def test_the_prompt_has_all_tools_and_the_grammar_those_that_are_allowed(
    serve_script, saying, byte_level, view_of
):
    model = view_of(byte_level, structured_output=True, tool_parser="hermes")
    script = saying('[{"name": "put", "parameters": {}}]', finish=FinishReason.STOP)
    async with serve_script(script, views=[model], parsers=BuiltInParsers()) as served:
        for choice in ("required", allowing("put", "required"), allowing("put")):
            body = both_tools(tool_choice=choice)
            answer = (await served.http.post("/v1/chat/completions", json=body)).json()["choices"][0]
            if choice != allowing("put"):
                assert answer["finish_reason"] == "tool_calls"
                assert answer["message"]["tool_calls"][0]["function"]["name"] == "put"
    every, one, none = served.completer.requests
    assert every.token_ids == one.token_ids == none.token_ids
    names = [re.findall('"enum": ."([a-z]+)"', it.sampling.structured.spec) for it in (every, one)]
    assert names == [["get", "put"], ["put"]]
    assert none.sampling.structured is None


class CarefulParser:
    """A CallParser and its answers: calls show as they come in a stream, and when complete in a whole."""

    skip_special_tokens = True

    def structured(self, prompt_ids):
        return None

    def answer(self, prompt_ids):
        return CarefulParser()

    def push(self, text, token_ids, *, finished):
        return Parsed(tool_calls=[ToolCallDelta(0, "call-1", "get", text)])

    def whole(self, text, token_ids):
        return self.push(text, token_ids, finished=True) if text.endswith("}") else Parsed()

    def reasoning_tokens(self, token_ids):
        return 0


@pytest.mark.parametrize("text", ['{"city": "Paris"}', '{"city": "Pa'])
def test_a_forced_call_that_the_model_breaks_off_is_the_same_whole_and_streamed(text):
    found = []
    for stream in (False, True):
        rules = ReplyRules(CarefulParser(), stream=stream, required=True, auto=False, show_tokens=True)
        reply = Reply(rules, [1])
        reply.add(text, [5], finished=True)
        found.append(reply.take()[0] if stream else reply.whole(cut=False))
        assert reply.finish_name(FinishReason.STOP) == "tool_calls"
    assert found[0] == found[1] == Parsed(tool_calls=[ToolCallDelta(0, "call-1", "get", text)])


async def test_an_answer_that_is_all_hidden_reasoning_has_no_content(ask):
    message, _, _ = await ask("A name.", include_reasoning=False)
    assert message["content"] is None


async def test_what_calls_must_look_like_reaches_the_engine(serve_script, saying, model):
    async with serve_script(saying(CALL), views=[model], parsers=TagParsers()) as served:
        body = {"model": "tiny", "messages": HI, "tools": TOOLS, "tool_choice": "required"}
        await served.http.post("/v1/chat/completions", json=body)
    structured = served.completer.requests[0].sampling.structured
    assert (structured.kind, structured.reasoning_ended) == ("json", False)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "fields", "message", "field"),
    [
        ("completions", {"structured_outputs": {"regex": "(("}}, "regex: wrong", "structured_outputs"),
        ("completions", {"response_format": {"type": "json_object"}}, "no", "response_format"),
        ("responses", {"text": {"format": {"type": "json_object"}}}, "no", "text.format"),
        ("chat/completions", {"tools": TOOLS, "tool_choice": "required"}, "no", "tools"),
        ("completions", {"structured_outputs": {"regex": "a"}}, "`logprobs` is not there", "logprobs"),
        ("completions", {}, "no", None),
    ],
)
async def test_a_refusal_by_the_engine_names_the_clients_field(
    serve_script, byte_level, view_of, path, fields, message, field, stream
):
    view = view_of(byte_level, structured_output=True, tool_parser="hermes")
    refusal = RequestRejected(message, code=REJECTED_BY_ENGINE)
    async with serve_script(lambda request: [refusal], views=[view], parsers=BuiltInParsers()) as served:
        asked = {"completions": {"prompt": "Hi"}, "responses": {"input": "Hi"}}
        body = {"model": "tiny", "stream": stream} | asked.get(path, {"messages": HI}) | fields
        response = await served.http.post(f"/v1/{path}", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "rejected_by_engine", field)
    named = field is None or message.startswith("`")
    assert error["message"] == (message if named else f"`{field}`: {message}")


class TestASchemaThatNoEngineCanHoldTo:
    """`multipleOf` stands for what an engine refuses."""

    SCHEMA = {"type": "object", "properties": {"tags": {"multipleOf": 2}}}
    WRONG = {"type": "object", "properties": {"tags": {"type": "set", "multipleOf": 2}}}

    @pytest.fixture
    def ask_for(self, serve_script, byte_level, view_of, saying):
        answer = saying('[{"name": "get", "parameters": {"tags": []}}]')
        refusal = RequestRejected("no multipleOf", code=REJECTED_BY_ENGINE)

        def script(request):
            wanted = request.sampling.structured
            return [refusal] if wanted is not None and '"multipleOf"' in wanted.spec else answer(request)

        async def ask_for(path, body, *, strict=None, **fields):
            view = view_of(byte_level, structured_output=True, tool_parser="hermes")
            function = {"name": "get", "parameters": self.SCHEMA, "strict": strict}
            tool = {"chat/completions": {"type": "function", "function": function}}.get(
                path, {"type": "function", **function}
            )
            body = {"model": "tiny", "tools": [tool], "tool_choice": "required", **body, **fields}
            async with serve_script(script, views=[view], parsers=BuiltInParsers()) as served:
                return await served.http.post(f"/v1/{path}", json=body)

        return ask_for

    @pytest.mark.parametrize("choices", [1, 2])
    async def test_forced_call_of_a_tool_that_is_not_strict_is_served_without(self, ask_for, choices):
        response = await ask_for("chat/completions", {"messages": HI, "n": choices})
        assert response.status_code == 200
        for choice in response.json()["choices"]:
            (call,) = choice["message"]["tool_calls"]
            assert call["function"] == {"name": "get", "arguments": '{"tags": []}'}

    async def test_so_is_one_in_a_stream_of_another_api(self, ask_for):
        response = await ask_for("responses", {"input": "Hi", "stream": True})
        assert response.status_code == 200
        _, _, done = response.text.partition("event: response.function_call_arguments.done\ndata: ")
        assert json.loads(done.splitlines()[0])["arguments"] == '{"tags": []}'

    async def test_strict_tool_is_refused(self, ask_for):
        response = await ask_for("chat/completions", {"messages": HI}, strict=True)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")

    @pytest.mark.parametrize(("strict", "schema"), [(True, SCHEMA), (None, WRONG), (False, WRONG)])
    async def test_so_is_the_format_of_an_answer_that_is_strict_or_no_schema(self, ask_for, strict, schema):
        format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": strict}}
        fields = {"tools": None, "tool_choice": None, "response_format": format}
        response = await ask_for("chat/completions", {"messages": HI}, **fields)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "response_format")

    @pytest.mark.parametrize("strict", [None, False])
    @pytest.mark.parametrize(
        ("path", "body"),
        [
            ("chat/completions", {"messages": HI}),
            ("completions", {"prompt": "Hi"}),
            ("responses", {"input": "Hi"}),
        ],
    )
    async def test_answer_of_a_format_that_is_not_strict_is_served_without(
        self, ask_for, path, body, strict
    ):
        named = {"name": "x", "schema": self.SCHEMA, "strict": strict}
        format = {"response_format": {"type": "json_schema", "json_schema": named}}
        if path == "responses":
            format = {"text": {"format": {"type": "json_schema", **named}}}
        response = await ask_for(path, body, tools=None, tool_choice=None, **format)
        assert response.status_code == 200
        assert "parameters" in response.text  # the whole answer


async def test_reasoning_that_nobody_is_to_see_shows_nowhere(ask):
    message, _, answer = await ask("hm</think>Hi", include_reasoning=False, logprobs=True)
    assert message["reasoning"] is None
    assert answer["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_cannot_be_read_is_an_error_and_ends(
    serve_script, deltas, byte_level, model, stream
):
    token_ids = byte_level.encode("unreadable and more").ids
    script = lambda request: [*deltas(token_ids[:-1], finish=None), Delta(token_ids[-1:])]  # noqa: E731
    if not stream:
        script = lambda request: deltas(token_ids)  # noqa: E731
    async with serve_script(script, views=[model], parsers=TagParsers()) as served:
        body = {"model": "tiny", "messages": HI, "stream": stream}
        response = await served.http.post("/v1/chat/completions", json=body)
    assert "unparsable_answer" in response.text
    assert response.status_code == (200 if stream and "data: " in response.text else 500)
    if stream:
        assert served.completer.cancelled


async def test_parsers_that_cannot_be_had(serve_script, byte_level, view_of, caplog):
    model = view_of(byte_level, tool_parser="tags", reasoning_parser="tags")
    body = {"model": "tiny", "messages": HI}
    async with serve_script("hm</think>Hi", views=[model]) as served:
        answer = (await served.http.post("/v1/chat/completions", json=body)).json()
        assert answer["choices"][0]["message"]["content"] == "hm</think>Hi"
        refused = await served.http.post("/v1/chat/completions", json=body | {"tools": TOOLS})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tools")
    assert "vLLM is not installed" in caplog.text
    model = view_of(byte_level, tool_parser="unknown")
    async with serve_script("Hi", views=[model], parsers=TagParsers()) as served:
        broken = await served.http.post("/v1/chat/completions", json=body)
        assert (broken.status_code, broken.json()["error"]["code"]) == (500, "unusable_tokenizer")
    model = view_of(byte_level, reasoning_parser="tags")
    async with serve_script("Hi", views=[model], parsers=TagParsers()) as served:
        refused = await served.http.post("/v1/chat/completions", json=body | {"tools": TOOLS})
        assert "--tool-call-parser" in refused.json()["error"]["message"]
