"""Chat answers taken apart, as clients get them."""

import json

import pytest

from penstock.shapes import Delta, FinishReason
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


async def test_an_answer_without_calls_ends_as_ever(ask):
    message, finish, _ = await ask("No.", tools=TOOLS, **PLAIN)
    assert (message["content"], finish, "tool_calls" in message) == ("No.", "stop", False)


async def test_what_calls_must_look_like_reaches_the_engine(serve_script, saying, model):
    async with serve_script(saying(CALL), views=[model], parsers=TagParsers()) as served:
        body = {"model": "tiny", "messages": HI, "tools": TOOLS, "tool_choice": "required"}
        await served.http.post("/v1/chat/completions", json=body)
    structured = served.completer.requests[0].sampling.structured
    assert (structured.kind, structured.reasoning_ended) == ("json", False)


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
