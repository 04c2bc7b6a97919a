"""The built-in parsers keep the contract that vLLM's keep, and read each format however it is cut."""

import json

import pytest

from penstock.frontend.parsers.built_in import TOOL_FORMATS, BuiltInParsers
from penstock.shapes import Answering
from tests.frontend.parser_contract import PLAIN, PROMPT_IDS, TOOLS, ParserContract, streamed


class TestBuiltInParsers(ParserContract):
    @pytest.fixture
    def parsers(self):
        return BuiltInParsers()

    @pytest.mark.parametrize(
        ("fields", "reasons"),
        [
            ({"reasoning_effort": "none"}, False),
            ({"reasoning_effort": "low"}, True),
            ({"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}, True),
        ],
    )
    def test_effort_of_none_is_an_answer_without_reasoning(self, parsers, model, fields, reasons):
        answer = parsers.load(model).begin({"messages": [], **fields}).answer(PROMPT_IDS)
        whole = answer.whole("It is 12.", [])
        assert (whole.reasoning, whole.content or "") == (
            ("It is 12.", "") if reasons else (None, "It is 12.")
        )


@pytest.fixture
def read(byte_level, view_of):
    """What is made of an answer in one of the formats: cut at every place, the same as whole."""

    def read(format, text, **fields):
        view = view_of(byte_level, tool_parser=format)
        begun = BuiltInParsers().load(view).begin({"messages": [], "tools": TOOLS, **fields})
        whole = begun.answer(PROMPT_IDS).whole(text, [])
        calls = [(call.name, json.loads(call.arguments)) for call in whole.tool_calls]
        for cut in range(len(text) + 1):
            answer = begun.answer(PROMPT_IDS)
            parts = [
                answer.push(text[:cut], [], finished=False),
                answer.push(text[cut:], [], finished=True),
            ]
            assert streamed(parts) == (whole.content or "", "", calls)
        return whole.content or "", calls

    return read


GET = ("get", {"a": ["}", '\\"{'], "b": {}})
ARGUMENTS = json.dumps(GET[1])
NAMED = '{"name": "get", "arguments": ' + ARGUMENTS + "}"


@pytest.mark.parametrize(
    ("format", "text", "content", "calls"),
    [
        ("hermes", "Yes.", "Yes.", []),
        ("hermes", "a < b <tool", "a < b <tool", []),
        ("hermes", f"I look.<tool_call>\n{NAMED}\n</tool_call>", "I look.", [GET]),
        ("hermes", f"<tool_call>{NAMED}</tool_call>\n<tool_call>{NAMED}</tool_call>", "", [GET, GET]),
        (
            "hermes",
            '<tool_call>{"arguments": {"a": 1}, "name": "get"}</tool_call>',
            "",
            [("get", {"a": 1})],
        ),
        ("hermes", '<tool_call>{"name": "get", "arguments": {}, "id": [1]}</tool_call>', "", [("get", {})]),
        ("hermes", '<tool_call>{"name": "g\\u0065t", "arguments": {}}</tool_call>', "", [("get", {})]),
        ("hermes", "<tool_call>no call</tool_call>", "<tool_call>no call</tool_call>", []),
        ("hermes", "Hm <tool_call>", "Hm <tool_call>", []),
        ("hermes", '<tool_call>{"nam', '<tool_call>{"nam', []),
        ("llama3_json", f"{NAMED}; {NAMED}", "", [GET, GET]),
        ("llama3_json", '{"name": "get", "parameters": {"a": 1}}', "", [("get", {"a": 1})]),
        ("llama3_json", f"I say {NAMED}", f"I say {NAMED}", []),
        ("mistral", f"[TOOL_CALLS][{NAMED}, {NAMED}]", "", [GET, GET]),
    ],
)
def test_calls_are_read_however_the_text_is_cut(read, format, text, content, calls):
    assert read(format, text) == (content, calls)


def test_second_call_is_left_out_where_one_is_allowed(read):
    text = f"<tool_call>{NAMED}</tool_call><tool_call>{NAMED}</tool_call>"
    assert read("hermes", text, parallel_tool_calls=False) == ("", [GET])


def test_required_call_is_read_from_the_list_that_was_asked_for(read):
    text = '[{"name": "get", "parameters": {"a": 1}}, {"name": "get", "parameters": {}}]'
    assert read("hermes", text, tool_choice="required") == ("", [("get", {"a": 1}), ("get", {})])


def test_named_tool_gets_the_whole_answer_as_its_arguments(read):
    choice = {"type": "function", "function": {"name": "get"}}
    assert read("hermes", ARGUMENTS, tool_choice=choice) == ("", [GET])
    assert read("hermes", "", tool_choice=choice) == ("", [])


OPENED = '<tool_call>{"name": "get", "arguments": '


@pytest.mark.parametrize("cut", range(len(OPENED) + 1, len(NAMED) + 10))
def test_call_that_was_cut_has_what_came_of_its_arguments(byte_level, view_of, cut):
    parser = BuiltInParsers().load(view_of(byte_level, tool_parser="hermes"))
    text = f"<tool_call>{NAMED}"[:cut]
    whole = parser.begin({"messages": [], "tools": TOOLS}).answer([]).whole(text, [])
    (call,) = whole.tool_calls
    assert (whole.content, call.name, call.arguments) == (None, "get", ARGUMENTS[: cut - len(OPENED)])


def test_forced_calls_are_held_to_the_schemas_of_the_tools(byte_level, view_of):
    parser = BuiltInParsers().load(view_of(byte_level, tool_parser="hermes"))
    given = {"messages": [], "tools": TOOLS}
    wanted = parser.begin({**given, "tool_choice": "required", "parallel_tool_calls": False})
    schema = json.loads(wanted.structured([]).spec)
    assert (schema["minItems"], schema["maxItems"]) == (1, 1)
    assert schema["items"]["anyOf"][0]["properties"]["name"] == {"enum": ["get"]}
    named = parser.begin({**given, "tool_choice": {"type": "function", "function": {"name": "get"}}})
    assert json.loads(named.structured([]).spec) == TOOLS[0]["function"]["parameters"]


@pytest.mark.parametrize(
    ("parameters", "held_to"),
    [
        (None, {"type": "object", "properties": {}}),
        ({}, {"type": "object", "properties": {}}),
        ({"properties": {"a": {}}}, {"type": "object", "properties": {"a": {}}}),
        ({"type": ["object", "null"]}, {"type": "object"}),
        ({"type": "string"}, {"type": "object"}),
    ],
)
def test_forced_arguments_are_an_object_whatever_their_schema_says(
    byte_level, view_of, parameters, held_to
):
    parser = BuiltInParsers().load(view_of(byte_level, tool_parser="hermes"))
    tools = [{"type": "function", "function": {"name": "get", "parameters": parameters}}]
    choice = {"type": "function", "function": {"name": "get"}}
    named = parser.begin({"messages": [], "tools": tools, "tool_choice": choice})
    assert json.loads(named.structured([]).spec) == held_to


def test_special_tokens_are_part_of_the_text_where_calls_may_be_made(byte_level, view_of):
    parser = BuiltInParsers().load(view_of(byte_level, tool_parser="hermes"))
    assert not parser.begin({"messages": [], "tools": TOOLS}).skip_special_tokens
    assert parser.begin({"messages": [], **PLAIN}).skip_special_tokens
    assert not parser.begin({"messages": [], "skip_special_tokens": False}).skip_special_tokens


def test_names_that_are_not_built_in_are_told_apart():
    assert all(BuiltInParsers().has(Answering(tool_parser=name)) for name in ("", *TOOL_FORMATS))
    assert not BuiltInParsers().has(Answering(tool_parser="kimi_k2"))
    assert not BuiltInParsers().has(Answering(reasoning_parser="kimi_k2"))


async def test_text_that_opens_brackets_for_ever_costs_no_more_than_its_length(read, byte_level, view_of):
    parser = BuiltInParsers().load(view_of(byte_level, tool_parser="hermes"))
    answer = parser.begin({"messages": [], "tools": TOOLS}).answer([])
    parts = [answer.push('<tool_call>{"x": ', [], finished=False)]
    parts += [answer.push("[" * 100, [], finished=False) for _ in range(2000)]
    parts.append(answer.push("", [], finished=True))
    assert len(parts[-1].content) > 200_000
