"""What a body may say, and how a wrong one is answered."""

import codecs
import json
import time

import pytest

from penstock.errors import Rejection, RequestRejected
from penstock.frontend.chat import Chat
from penstock.frontend.completions import Completions
from penstock.frontend.openai import MAX_CHOICES, MAX_STOPS, decode_chat, decode_completion
from penstock.frontend.tools import MAX_TOOLS
from penstock.shapes import Sampling, SamplingDefaults

HI = [{"role": "user", "content": "Hi"}]


def chat(**fields):
    return decode_chat(json.dumps({"model": "m", "messages": HI, **fields}).encode())


def completion(**fields):
    return decode_completion(json.dumps({"model": "m", "prompt": "Hi", **fields}).encode())


def rejection(decode, **fields):
    with pytest.raises(RequestRejected) as raised:
        decode(**fields)
    assert raised.value.kind is Rejection.INVALID
    return raised.value


def test_a_full_chat_request():
    request = chat(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                "name": "x",
            },
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
                ],
            },
            {"role": "tool", "content": "2", "tool_call_id": "1"},
        ],
        n=2,
        stop=["a", "b"],
        max_tokens=5,
        max_completion_tokens=7,
        logit_bias={"12": -100, "13": 5.5},
        logprobs=True,
        top_logprobs=3,
        stream=True,
        stream_options={"include_usage": True},
        tools=[],
        response_format={"type": "text"},
        modalities=["text"],
        user="u",
        service_tier="auto",
        some_future_field={"x": [1]},
    )
    wanted = Chat(request).wanted
    assert (wanted.choices, wanted.stops, wanted.stream) == (2, ("a", "b"), True)
    assert (wanted.max_tokens, wanted.max_tokens_field) == (7, "max_completion_tokens")
    assert wanted.sampling.logprobs == 3
    assert wanted.sampling.logit_bias == {12: -100.0, 13: 5.5}
    assert request.include_usage


def test_defaults():
    wanted = Chat(chat()).wanted
    assert (wanted.choices, wanted.max_tokens, wanted.stops, wanted.stream) == (1, None, (), False)
    assert wanted.sampling == Sampling(max_tokens=0)
    assert wanted.left_out == SamplingDefaults.__struct_fields__
    assert Chat(chat(logprobs=True)).wanted.sampling.logprobs == 0
    assert Chat(chat(logprobs=False)).wanted.sampling.logprobs is None
    assert Completions(completion()).wanted.max_tokens == 16
    assert Completions(completion(logprobs=0)).wanted.sampling.logprobs == 0
    assert Chat(chat(stop="x")).wanted.stops == ("x",)


def test_null_is_absence():
    names = ("n", "stop", "seed", "temperature", "top_p", "max_tokens", "logit_bias", "stream", "user")
    request = chat(**dict.fromkeys(names))
    assert request.n is None
    assert Chat(request).wanted.stops == ()


def allowed(*names, mode="auto"):
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts_come_in_four_kinds(prompt, expected):
    assert completion(prompt=prompt).prompts == expected


def test_whole_floats_are_integers():
    assert chat(max_tokens=5.0, n=1.0, seed=3.0).max_tokens == 5
    assert completion(prompt=[1.0, 2.0], logit_bias={"7": 1.5}).prompts == [[1, 2]]
    assert rejection(chat, max_tokens=5.5).field == "max_tokens"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [*HI, {"role": "user"}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "king", "content": ""}]}, "messages[0].role"),
        ({"messages": [{"content": ""}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
        ),
        ({"model": 3}, "model"),
        ({"model": ""}, "model"),
        ({"n": 0}, "n"),
        ({"n": MAX_CHOICES + 1}, "n"),
        ({"n": True}, "n"),
        ({"n": "2"}, "n"),
        ({"stream": 1}, "stream"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * (MAX_STOPS + 1)}, "stop"),
        ({"stop": ["x" * 5000]}, "stop[0]"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"messages": [{"role": "tool_use", "content": ""}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": ["x", 3]}]}, "messages[0].content[1]"),
        ({"messages": [{"role": "assistant", "audio": {"id": "a"}}]}, "messages[0].audio"),
        ({"tools": [{"function": {"name": "f"}}], "tool_choice": "any"}, "tool_choice"),
        ({"nvext": {"max_thinking_tokens": -5}}, "nvext.max_thinking_tokens"),
        ({"nvext": {"top_k": "x"}}, "nvext.top_k"),
        ({"nvext": {"never_heard_of": 1}}, "nvext"),
        ({"nvext": []}, "nvext"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"chat_template_args": {}, "chat_template_kwargs": {}}, "chat_template_args"),
        ({"documents": [["x"]]}, "documents[0]"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "custom", "function": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"function": {"name": ""}}]}, "tools[0].function.name"),
        ({"tools": [{"function": {"name": "f", "parameters": []}}]}, "tools[0].function.parameters"),
        ({"tools": [{"function": {"name": "f"}}] * (MAX_TOOLS + 1)}, "tools"),
        ({"tools": [{"function": {"name": "f"}}], "tool_choice": "some"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": "auto"}, "tool_choice"),
        (
            {"tools": [{"function": {"name": "f"}}], "tool_choice": {"function": {"name": "g"}}},
            "tool_choice.function.name",
        ),
        *(
            ({"tools": [{"function": {"name": "f"}}], "tool_choice": choice}, f"tool_choice.{field}")
            for choice, field in (
                ({"type": "function"}, "function"),
                ({"type": "allowed_tools"}, "allowed_tools"),
                ({"type": "allowed_tools", "function": {"name": "f"}}, "allowed_tools"),
                (allowed(mode="none"), "allowed_tools.mode"),
                (allowed(mode=None), "allowed_tools.mode"),
                (allowed(), "allowed_tools.tools"),
                (allowed("f", "g"), "allowed_tools.tools[1].function.name"),
            )
        ),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort"),
        ({"functions": [{}]}, "functions"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"chat_template": "x"}, "chat_template"),
        ({"guided_json": {}}, "guided_json"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"priority": "high"}, "priority"),
    ],
)
def test_a_wrong_chat_field_is_named(fields, field):
    error = rejection(chat, **fields)
    assert error.field == field
    assert "$" not in error.message


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"suffix": "x"}, "suffix"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"best_of": 3}, "best_of"),
        *(
            ({"repetition_detection": given}, f"repetition_detection.{field}")
            for given, field in (
                ({"max_pattern_size": 257, "min_count": 2}, "max_pattern_size"),
                ({"max_pattern_size": 2, "min_pattern_size": 3, "min_count": 2}, "min_pattern_size"),
                ({"max_pattern_size": 2}, "min_count"),
                ({"max_pattern_size": 2, "min_count": 1}, "min_count"),
            )
        ),
    ],
)
def test_a_wrong_completion_field_is_named(fields, field):
    assert rejection(completion, **fields).field == field


def test_tools_that_must_not_be_called_are_allowed():
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert not chat(tools=tools, tool_choice="none").calls_tools
    assert not chat(tools=[]).calls_tools
    assert not chat(tool_choice="none").calls_tools
    assert chat(tools=tools).calls_tools
    assert completion(best_of=2, n=2, echo=False, suffix="").n == 2


def test_missing_fields_are_named():
    for body, field in ((b"{}", "model"), (b'{"model": "m"}', "messages")):
        with pytest.raises(RequestRejected) as raised:
            decode_chat(body)
        assert (raised.value.field, raised.value.code) == (field, "missing_field")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"nonsense", b'{"model": "\xff"}', b'{"a":' + b"[" * 100_000],
    ids=["empty", "cut", "nonsense", "not utf-8", "deep"],
)
def test_what_is_no_json_is_refused(body):
    with pytest.raises(RequestRejected) as raised:
        decode_chat(body)
    assert (raised.value.kind, raised.value.code) == (Rejection.INVALID, "invalid_json")


def test_a_byte_order_mark_before_the_body_is_left_out():
    body = b'{"model": "m", "messages": [{"role": "user", "content": "Hi"}]}'
    assert decode_chat(codecs.BOM_UTF8 + body) == decode_chat(body)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (r"a\ud83d", "a\ufffd"),
        (r"\uDE00b", "\ufffdb"),
        (r"\ud83d\ud83d\ude00\ude00", "\ufffd😀\ufffd"),
        (r"\ud83d\n\u00e9", "\ufffd\né"),
        (r"\\ud83d\ud83d", "\\ud83d\ufffd"),
        (r"\\\ud83d", "\\\ufffd"),
        (r"\ud83d\ude00", "😀"),
    ],
)
def test_half_of_a_character_is_read_as_the_replacement_character(written, read):
    body = b'{"model": "tiny", "messages": [{"role": "user", "content": "%b"}]}' % written.encode()
    assert decode_chat(body).messages[0].content == read


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        ('{"model": "m"}'.encode("utf-16"), "it is UTF-16, and must be UTF-8"),
        ('{"model": "m"}'.encode("utf-16-be"), "it is UTF-16, and must be UTF-8"),
        ('{"model": "\u00e9"}'.encode("latin-1"), "it is not UTF-8"),
        (b'{"x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "it is nested too deep"),
    ],
)
def test_what_is_wrong_with_a_body_is_said_in_words_of_its_own(body, wrong):
    with pytest.raises(RequestRejected, match=wrong) as raised:
        decode_chat(body)
    assert raised.value.code == "invalid_json"


def test_body_of_nothing_but_halves_is_no_json_and_costs_little():
    content = r"\ud83d" * 2_000_000
    began = time.perf_counter()
    with pytest.raises(RequestRejected) as caught:
        decode_completion(b'{"model": "tiny", "prompt": "%b"}' % content.encode())
    assert caught.value.code == "invalid_json"
    assert time.perf_counter() - began < 2.0


def test_json_that_is_no_object_is_refused():
    with pytest.raises(RequestRejected, match="The body must be an object, not a list"):
        decode_chat(b"[1.0]")


def test_an_effort_tells_templates_whether_to_reason_but_the_client_knows_better():
    assert chat().template_variables == {}
    assert chat(reasoning_effort="low").template_variables == {
        "reasoning_effort": "low",
        "enable_thinking": True,
    }
    assert chat(reasoning_effort="none").template_variables["enable_thinking"] is False
    own = chat(reasoning_effort="none", chat_template_kwargs={"enable_thinking": True, "x": 1})
    assert own.template_variables == {"reasoning_effort": "none", "enable_thinking": True, "x": 1}
