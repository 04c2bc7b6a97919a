"""What a body of Anthropic's API means, as a chat: fields, and conversations as agents send them back."""

import json

import msgspec
import pytest
from msgspec import inspect

from penstock.errors import RequestRejected
from penstock.frontend.anthropic import (
    ANTHROPIC_HARMLESS,
    ANTHROPIC_REFUSED,
    ConversationRequest,
    MessagesRequest,
    decode_messages,
)
from penstock.frontend.anthropic_chat import chat_request
from penstock.frontend.chat import template_input_of
from penstock.frontend.messages import template_messages
from tests.frontend.test_fields import body_with_null, optional_fields

BODY = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
TOOL = {"name": "get", "description": "Gets.", "input_schema": {"type": "object", "properties": {}}}
USER = {"role": "user", "content": "Hi"}


def chat(**fields):
    return chat_request(decode_messages(json.dumps(BODY | fields).encode()))


def shown(*messages, **fields):
    return template_messages(chat(messages=messages, **fields).messages)


def refused(**fields):
    with pytest.raises(RequestRejected) as raised:
        chat(**fields)
    return raised.value.field, str(raised.value)


def text(content, **fields):
    return {"type": "text", "text": content, **fields}


def calling(given, **fields):
    call = {"type": "tool_use", "id": "toolu_1", "name": "get", "input": given, **fields}
    return {"role": "assistant", "content": [call]}


def result(content, **fields):
    return {"type": "tool_result", "tool_use_id": "toolu_1", "content": content, **fields}


# --- fields ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ANTHROPIC_REFUSED)
def test_a_field_that_would_change_the_answer_is_refused_by_its_name(name):
    field, message = refused(**{name: {"x": 1}})
    assert field == name
    assert f"`{name}`" in message
    chat(**dict.fromkeys(ANTHROPIC_REFUSED))


@pytest.mark.parametrize("name", ANTHROPIC_HARMLESS)
def test_a_harmless_field_may_have_any_value_and_has_its_reason_beside_it(name):
    for value in (None, 1, "x", [1], {"type": "ephemeral"}):
        assert chat(**{name: value}) == chat()
    assert ANTHROPIC_HARMLESS[name]


@pytest.mark.parametrize("kind", [MessagesRequest, ConversationRequest])
def test_null_is_the_same_as_leaving_a_field_out(kind):
    request = inspect.type_info(kind)
    paths = list(optional_fields(request))
    assert len(paths) > 30
    wrong = {}
    for path in paths:
        try:
            msgspec.json.decode(json.dumps(body_with_null(request, path)).encode(), type=kind)
        except msgspec.ValidationError as error:
            wrong[".".join(str(step[1] if step else step) for step in path)] = str(error)
    assert wrong == {}


def test_a_body_of_nulls_is_one_of_defaults():
    names = set(MessagesRequest.__struct_fields__) - BODY.keys()
    assert chat(**dict.fromkeys(names)) == chat()


def test_limit_of_thinking_is_that_of_a_chat():
    assert chat(thinking={"type": "enabled", "budget_tokens": 2048}).thinking_token_budget == 2048
    assert chat(thinking={"type": "disabled"}).thinking_token_budget is None


def test_sampling_fields_are_those_of_a_chat():
    request = chat(
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        stop_sequences=["a", "b"],
        stream=True,
        cache_salt="s",
        priority=3,
        something_nobody_knows=1,
    )
    assert (request.max_tokens, request.temperature, request.top_p, request.top_k) == (9, 0.5, 0.9, 7)
    assert (request.stop, request.stream, request.cache_salt, request.priority) == (
        ["a", "b"],
        True,
        "s",
        3,
    )


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "system", "content": ""}]}, "messages"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"temperature": "1"}, "temperature"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [TOOL, {"input_schema": {}}]}, "tools[1].name"),
        ({"tools": [TOOL | {"allowed_callers": ["code_execution_20260120"]}]}, "tools[0].allowed_callers"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "f"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "required"}}, "tool_choice.type"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"output_config": {"effort": "minimal"}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        (
            {
                "output_config": {"format": {"schema": {}, "type": "json_schema"}},
                "output_format": {"schema": {}, "type": "json_schema"},
            },
            "output_format",
        ),
    ],
)
def test_what_is_wrong_is_named(fields, field):
    named, message = refused(**fields)
    assert named == field
    assert f"`{field}`" in message


def test_a_schema_that_is_too_long_or_too_deep_is_refused_where_it_was_given():
    deep: dict = {}
    for _ in range(80):
        deep = {"properties": {"a": deep}}
    assert refused(output_config={"format": {"schema": deep}})[0] == "output_config.format.schema"
    assert refused(output_format={"schema": {"title": "x" * 300_000}})[0] == "output_format.schema"
    assert refused(tools=[TOOL | {"input_schema": deep}])[0] == "tools[0].input_schema"


# --- tools, thinking, output ----------------------------------------------------------------------


def test_tools_are_functions():
    request = chat(
        tools=[
            TOOL | {"strict": True, "cache_control": {"type": "ephemeral"}, "type": "custom"},
            {"name": "b", "input_schema": {"type": "object"}, "input_examples": [{"a": 1}]},
        ]
    )
    first, second = template_input_of(request).tools
    assert first["function"] == {
        "name": "get",
        "description": "Gets.",
        "parameters": TOOL["input_schema"],
        "strict": True,
    }
    assert second["function"]["parameters"] == {"type": "object", "examples": [{"a": 1}]}


@pytest.mark.parametrize(
    ("choice", "expected", "parallel"),
    [
        (None, None, None),
        ({"type": "auto"}, "auto", None),
        ({"type": "any"}, "required", None),
        ({"type": "none"}, "none", None),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto", False),
        ({"type": "any", "disable_parallel_tool_use": False}, "required", None),
    ],
)
def test_choices_of_tools(choice, expected, parallel):
    request = chat(tools=[TOOL], tool_choice=choice)
    assert (request.tool_choice, request.parallel_tool_calls) == (expected, parallel)


def test_the_choice_of_one_tool():
    request = chat(tools=[TOOL], tool_choice={"type": "tool", "name": "get"})
    assert request.tool_choice.function.name == "get"
    assert chat(tools=[], tool_choice={"type": "auto"}).tool_choice is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 2048}},
            {"enable_thinking": True, "thinking": True},
        ),
        ({"thinking": {"type": "adaptive"}}, {"enable_thinking": True, "thinking": True}),
        ({"thinking": {"type": "disabled"}}, {"enable_thinking": False, "thinking": False}),
        ({"output_config": {"effort": "high"}}, {"reasoning_effort": "high", "enable_thinking": True}),
        (
            {"output_config": {"effort": "low"}, "thinking": {"type": "disabled"}},
            {"reasoning_effort": "low", "enable_thinking": False, "thinking": False},
        ),
        (
            {"thinking": {"type": "disabled"}, "chat_template_kwargs": {"thinking": True}},
            {"enable_thinking": False, "thinking": True},
        ),
    ],
)
def test_thinking_and_effort_are_the_templates_switches(fields, expected):
    assert chat(**fields).template_variables == expected


@pytest.mark.parametrize("place", ["output_format", "output_config"])
def test_a_schema_is_the_form_of_the_output(place):
    schema = {"type": "object"}
    format = {"type": "json_schema", "schema": schema}
    request = chat(**{place: format if place == "output_format" else {"format": format}})
    assert request.response_format.json_schema.schema == schema


# --- messages -------------------------------------------------------------------------------------


def test_a_turn_of_an_agent():
    messages = shown(
        {"role": "user", "content": [text("Weather?", cache_control={"type": "ephemeral"})]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "I look.", "signature": "of another server"},
                {"type": "redacted_thinking", "data": "opaque"},
                text("Let me see."),
                {"type": "tool_use", "id": "a", "name": "get", "input": {"city": "Paris"}},
                {"type": "tool_use", "id": "b", "name": "get", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                result("sunny", tool_use_id="a"),
                result([text("no"), text("such city")], tool_use_id="b", is_error=True),
                text("And now?"),
            ],
        },
        system=[text("You help."), text("Be brief.")],
    )
    assert [message["role"] for message in messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "tool",
        "user",
    ]
    assert messages[0]["content"] == "You help.\nBe brief."
    assert messages[2]["content"] == "Let me see."
    assert messages[2]["reasoning"] == "I look."
    assert [call["function"]["arguments"] for call in messages[2]["tool_calls"]] == [{"city": "Paris"}, {}]
    assert [call["id"] for call in messages[2]["tool_calls"]] == ["a", "b"]
    assert [(message["tool_call_id"], message["content"]) for message in messages[3:5]] == [
        ("a", "sunny"),
        ("b", "Error: no\nsuch city"),
    ]
    assert messages[5]["content"] == "And now?"


@pytest.mark.parametrize("given", [None, "", '{"city": "Par', "null", [], [1], 7, True, {}, "nonsense"])
def test_whatever_a_model_wrote_as_input_refuses_no_conversation(given):
    messages = shown(USER, calling(given), {"role": "user", "content": [result("ok")]})
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize(
    "content", [None, "", [], [text("")], [text(None)], [{"type": "thinking", "thinking": ""}]]
)
def test_an_empty_answer_refuses_no_conversation(content):
    messages = shown(USER, {"role": "assistant", "content": content}, USER)
    assert [message["content"] for message in messages] == ["Hi", "", "Hi"]


@pytest.mark.parametrize("content", [None, "", []])
def test_a_tool_may_give_nothing(content):
    messages = shown(USER, calling({}), {"role": "user", "content": [result(content)]})
    assert messages[2] == {"role": "tool", "content": "", "tool_call_id": "toolu_1"}


def test_consecutive_messages_of_a_role_are_one():
    messages = shown(
        USER,
        {"role": "user", "content": [text("there")]},
        {"role": "assistant", "content": "a"},
        calling({}),
        {"role": "user", "content": [text("and"), result("r")]},
        {"role": "user", "content": "so"},
    )
    assert [(message["role"], message["content"]) for message in messages] == [
        ("user", "Hi\nthere"),
        ("assistant", "a"),
        ("tool", "r"),
        ("user", "and\nso"),
    ]
    assert len(messages[1]["tool_calls"]) == 1


def test_system_messages_keep_their_place():
    reminder = {"role": "system", "content": "Remember.", "clear_at": "next_user_message"}
    assert [message["role"] for message in shown(USER, reminder)] == ["user", "system"]
    assert [message["content"] for message in shown(USER, reminder, USER)] == ["Hi\nHi"]
    kept = {"role": "system", "content": [text("Remember.")]}
    assert [message["content"] for message in shown(USER, kept, USER)] == ["Hi", "Remember.", "Hi"]


def test_the_line_that_differs_with_each_request_of_claude_code_is_left_out():
    line = "x-anthropic-billing-header: cc_version=2.1.177.01c; cc_entrypoint=cli; cch=%s;"
    for system in ([text(line % "36ee5"), text("You help.")], f"{line % '0aaa9'}\nYou help."):
        assert shown(USER, system=system)[0] == {"role": "system", "content": "You help."}
    assert [message["role"] for message in shown(USER, system=line % "1")] == ["user"]


def test_a_final_message_of_the_assistant_is_continued():
    request = chat(messages=[USER, {"role": "assistant", "content": [text("{")]}])
    assert (request.add_generation_prompt, request.continue_final_message) == (False, True)
    for last in (USER, calling({})):
        request = chat(messages=[USER, last])
        assert (request.add_generation_prompt, request.continue_final_message) == (None, None)


@pytest.mark.parametrize(
    ("role", "kind"),
    [
        ("user", "image"),
        ("user", "document"),
        ("user", "search_result"),
        ("user", "tool_use"),
        ("user", "container_upload"),
        ("assistant", "server_tool_use"),
        ("assistant", "web_search_tool_result"),
        ("assistant", "tool_result"),
        ("system", "tool_addition"),
    ],
)
def test_blocks_that_are_not_served_are_named(role, kind):
    block = {"type": kind, "source": {}, "content": {"type": "x"}, "name": "n", "id": "i"}
    field, message = refused(messages=[USER, {"role": role, "content": [text("a"), block]}])
    where = "messages[1].content[1].type"
    assert field == where
    assert f"`{kind}`" in message


def test_in_the_result_of_a_tool_only_text_is_served():
    content = [result([text("a"), {"type": "image", "source": {}}])]
    field, _ = refused(messages=[USER, calling({}), {"role": "user", "content": content}])
    assert field == "messages[2].content[0].content[1].type"
    field, _ = refused(messages=[USER, calling({}), {"role": "user", "content": [result({"a": 1})]}])
    assert field == "messages[2].content[0].content"
