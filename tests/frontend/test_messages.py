"""A conversation is never refused because of what a model wrote in it."""

import json

import pytest

from penstock.errors import RequestRejected
from penstock.frontend import messages as chat_messages
from penstock.frontend.messages import TEXT_PARTS, openai_messages, template_messages
from penstock.frontend.openai import decode_chat
from penstock.logs.quiet_log import QuietLog


@pytest.fixture(autouse=True)
def unused_log(monkeypatch):
    """The log says the same only a few times a minute."""
    monkeypatch.setattr(chat_messages, "_quiet_log", QuietLog(chat_messages.log))


BILLING = "x-anthropic-billing-header: cc_version=2.1.177.01c; cc_entrypoint=cli; cch=%s;"
CUT = '{"city": "Par'


def decoded(*messages):
    return decode_chat(json.dumps({"model": "m", "messages": messages}).encode()).messages


def shown(*messages):
    return template_messages(decoded(*messages))


def calling(arguments, **fields):
    function = {"name": "f", "arguments": arguments}
    return {
        "role": "assistant",
        "tool_calls": [{"id": "c", "type": "function", "function": function}],
        **fields,
    }


@pytest.mark.parametrize(
    ("arguments", "expected", "logged"),
    [
        ('{"a": [1, null]}', {"a": [1, None]}, False),
        ({"a": 1}, {"a": 1}, False),
        ("", {}, False),
        (None, {}, False),
        ({}, {}, False),
        (CUT, {}, True),
        ("{", {}, True),
        ("null", {}, True),
        ("[]", {}, True),
        ("[1]", {}, True),
        ('"text"', {}, True),
        ("42", {}, True),
        ("true", {}, True),
        ("nonsense", {}, True),
        (" ", {}, True),
        ([], {}, True),
        (7, {}, True),
        (True, {}, True),
        ('{"a": ' * 100 + "1" + "}" * 100, {}, True),
        ('{"\\ud800": 1}', {}, True),
        ('{"a": "b\nc"}', {}, True),
    ],
)
def test_arguments_that_are_no_object_are_shown_as_an_empty_one(caplog, arguments, expected, logged):
    (message,) = shown(calling(arguments))
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": expected}
    assert ("messages[0].tool_calls[0].function.arguments of 'f'" in caplog.text) == logged


@pytest.mark.parametrize(
    ("custom", "arguments"),
    [
        ({"input": "2+2"}, {"input": "2+2"}),
        ({"input": None}, {"input": ""}),
        ({"input": [1]}, {"input": [1]}),
    ],
)
def test_call_of_a_custom_tool_is_shown_as_one_of_a_function_of_one_text(custom, arguments):
    call = {"id": "c", "type": "custom", "custom": {"name": "calc", **custom}}
    messages = decoded({"role": "assistant", "tool_calls": [call]})
    ((shown,),) = [it["tool_calls"] for it in template_messages(messages)]
    assert shown == {"id": "c", "type": "function", "function": {"name": "calc", "arguments": arguments}}
    ((sent,),) = [it["tool_calls"] for it in openai_messages(messages)]
    assert (sent["type"], json.loads(sent["function"]["arguments"])) == ("function", arguments)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        ({"id": "c"}, "function"),
        ({"type": "custom"}, "custom"),
        ({"type": "function", "function": None}, "function"),
    ],
)
def test_a_call_says_what_it_called(call, field):
    with pytest.raises(RequestRejected) as raised:
        decoded({"role": "assistant", "tool_calls": [call]})
    assert (raised.value.code, raised.value.field) == (
        "missing_field",
        f"messages[0].tool_calls[0].{field}",
    )


def test_each_call_stands_for_itself(caplog):
    functions = [{"function": {"name": name, "arguments": CUT if name == "b" else "{}"}} for name in "abc"]
    (_, message) = shown(
        {"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "tool_calls": functions}
    )
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["a", "b", "c"]
    assert "messages[1].tool_calls[1].function.arguments of 'b': no JSON" in caplog.text


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "refusal", "refusal": "no"}], "no"),
        ([{"type": "text", "text": None}, {"type": "text", "text": "hi"}], "hi"),
        ([{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b"}], "a\nb"),
        (["a", "b"], "a\nb"),
        (["a", {"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}], "a\nb"),
        ([{"type": "thinking", "thinking": "hm"}], "hm"),
        ([{"type": "refusal", "refusal": None}], ""),
        ([], ""),
        ("", ""),
        (None, ""),
    ],
)
@pytest.mark.parametrize("role", ["assistant", "tool", "user"])
def test_content_is_text_in_many_forms(role, content, text):
    if role == "user" and content is None:
        with pytest.raises(RequestRejected):
            decoded({"role": role, "content": content})
        return
    (message,) = shown({"role": role, "content": content})
    assert (message["role"], message["content"]) == (role, text)


@pytest.mark.parametrize(
    ("part", "field"),
    [
        ({"type": "image_url", "image_url": {"url": "data:,"}}, "messages[0].content[0].type"),
        ({"type": "input_audio", "input_audio": {}}, "messages[0].content[0].type"),
        ({"type": "file", "file": {}}, "messages[0].content[0].type"),
        ({"type": "tool_result", "content": "x"}, "messages[0].content[0].type"),
        ({"type": "text", "content": "x"}, "messages[0].content[0].text"),
        ({"type": "refusal", "text": "x"}, "messages[0].content[0].refusal"),
    ],
)
def test_what_is_no_text_is_refused_and_what_would_be_served_is_said(part, field):
    with pytest.raises(RequestRejected) as raised:
        decoded({"role": "user", "content": [part]})
    assert raised.value.field == field
    if field.endswith("type"):
        assert f"`{part['type']}`" in raised.value.message
        assert all(f"`{name}`" in raised.value.message for name in TEXT_PARTS)


def test_an_assistant_may_only_call_tools_and_an_empty_list_of_calls_is_none():
    for content in ({}, {"content": None}, {"content": ""}):
        (message,) = shown(calling("{}", **content))
        assert (message["content"], len(message["tool_calls"])) == ("", 1)
    for calls in ([], None):
        (message,) = shown({"role": "assistant", "content": "x", "tool_calls": calls})
        assert "tool_calls" not in message


def test_the_older_forms_of_calls_and_of_refusals():
    call, result = shown(
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": CUT}},
        {"role": "function", "name": "f", "content": "y"},
    )
    assert call["tool_calls"] == [
        {"id": "", "type": "function", "function": {"name": "f", "arguments": {}}}
    ]
    assert result == {"role": "function", "name": "f", "content": "y"}
    assert shown({"role": "assistant", "refusal": "No."})[0]["content"] == "No."
    assert shown({"role": "assistant", "content": "Yes.", "refusal": None})[0]["content"] == "Yes."


def test_what_the_openai_client_sends_back_of_an_answer_is_taken():
    answer = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": [
            {"id": "c", "index": 0, "type": "function", "function": {"name": "f", "arguments": "null"}}
        ],
        "reasoning": "why",
    }
    (message,) = shown(answer)
    assert message["tool_calls"][0]["function"]["arguments"] == {}
    assert message["reasoning"] == message["reasoning_content"] == "why"


def test_in_openais_own_shape_arguments_are_texts_again():
    messages = openai_messages(decoded(calling(CUT), {"role": "tool", "content": ["a", "b"]}))
    assert messages == [
        {
            "role": "assistant",
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "a\nb"},
    ]


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize(
    "content",
    [
        f"{BILLING}\nYou help.",
        [{"type": "text", "text": BILLING}, {"type": "text", "text": "You help."}],
    ],
)
def test_a_line_that_differs_with_each_request_of_claude_code_is_not_shown(role, content):
    given = json.dumps(content)
    prompts = [
        shown({"role": role, "content": json.loads(given.replace("%s", nonce))}) for nonce in ("36ee5", "0")
    ]
    assert prompts[0] == prompts[1]
    assert prompts[0][0]["content"] == "You help."


def test_a_user_may_write_of_such_a_line():
    line = BILLING % "36ee5"
    (user,) = shown({"role": "user", "content": line})
    assert user["content"] == line
    (system,) = shown({"role": "system", "content": f"Never write\n{line}"})
    assert system["content"] == f"Never write\n{line}"
