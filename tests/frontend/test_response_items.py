"""Items as messages, and an answer as items."""

import msgspec
import pytest

from penstock.frontend.responses_api.input_items import carried, messages_of
from penstock.frontend.responses_api.output_items import OutputItems
from penstock.frontend.responses_api.request_body import InputItem
from penstock.frontend.responses_api.tool_names import Offered
from penstock.shapes import Parsed, ToolCallDelta
from tests.frontend.named_events import named_events

CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "42"}
REASONING = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}], "summary": []}


def messages(*items):
    items = msgspec.convert(list(items), list[InputItem])
    return messages_of([(item, f"input[{index}]") for index, item in enumerate(items)])


def test_reasoning_text_and_calls_are_one_message():
    said = {"role": "assistant", "type": "message", "content": [{"type": "output_text", "text": "ok"}]}
    turn, result = messages(REASONING, said, CALL, CALL | {"call_id": "c2"}, OUTPUT)[:2]
    assert (turn.reasoning, turn.content) == ("hm", "ok")
    assert [(call.id, call.function.arguments) for call in turn.tool_calls] == [
        ("c1", {"a": 1}),
        ("c2", {"a": 1}),
    ]
    assert (result.role, result.content, result.tool_call_id) == ("tool", "42", "c1")


def test_text_after_calls_is_another_message():
    said = {"role": "assistant", "content": "done"}
    assert [message.content for message in messages(CALL, said, said)] == [None, "done", "done"]


@pytest.mark.parametrize("arguments", ['{"a": ', "[]", "null", None, "", 5])
def test_cut_or_odd_arguments_refuse_nothing(arguments):
    (turn,) = messages(CALL | {"arguments": arguments})
    assert turn.tool_calls[0].function.arguments == {}


@pytest.mark.parametrize(
    ("item", "reasoning"),
    [
        ({"type": "reasoning", "summary": [{"type": "summary_text", "text": "short"}]}, "short"),
        ({"type": "reasoning", "summary": [], "encrypted_content": carried("hm, 😀")}, "hm, 😀"),
        ({"type": "reasoning", "content": "hm"}, "hm"),
        ({"type": "reasoning", "summary": "short", "content": None}, "short"),
        ({"type": "reasoning", "summary": ["a", "b"]}, "a\nb"),
    ],
)
def test_reasoning_is_found_where_the_client_has_it(item, reasoning):
    assert messages(item)[0].reasoning == reasoning


@pytest.mark.parametrize("encrypted", [None, "gAAAA", "penstock:%", "penstock:gICA"])
def test_reasoning_that_others_encrypted_is_left_out(encrypted):
    assert messages({"type": "reasoning", "summary": [], "encrypted_content": encrypted}) == []


def test_refusals_and_empty_texts_of_a_model_are_accepted():
    refused = {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}
    assert [message.content for message in messages(refused, {"role": "assistant"})] == ["no", ""]


def test_custom_call_and_its_output_in_parts():
    call = {"type": "custom_tool_call", "call_id": "c", "name": "p", "input": "x"}
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    output = {"type": "custom_tool_call_output", "call_id": "c", "output": parts}
    turn, result = messages(call, output)
    assert turn.tool_calls[0].function.arguments == {"input": "x"}
    assert result.content == "a\nb"


# --- an answer as items ---------------------------------------------------------------------------

CALL_BEGINS = Parsed(tool_calls=[ToolCallDelta(0, "c0", "f", "{}")])


def answer_of(*parts):
    """The items of an answer that came in these parts, and the deltas of its text."""
    output = OutputItems("resp_0", {"f": Offered("function", "f")}, carries=False)
    events = b"".join([*(output.add(part, ()) for part in parts), output.end(complete=True)])
    told = named_events(events.decode())
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    return output.items, [event["delta"] for event in told if event["type"] == "response.output_text.delta"]


def test_space_between_calls_is_no_message_and_within_a_message_it_stays():
    texts = [Parsed(content=text) for text in ("\n", "Then", " ", "\n", "this.")]
    (call, message), deltas = answer_of(CALL_BEGINS, *texts)
    assert (call["type"], message["content"][0]["text"]) == ("function_call", "Then \nthis.")
    assert deltas == ["Then", " ", "\n", "this."]


def test_parts_without_anything_say_nothing():
    (message,), deltas = answer_of(Parsed(), Parsed(content=""), Parsed(content="a"), Parsed(content=""))
    assert (message["content"][0]["text"], deltas) == ("a", ["a"])


@pytest.mark.parametrize(
    ("cut", "text"),
    [
        ('{"input": "ls \\"a\\nb', 'ls "a\nb'),
        ('{"input": "x\\ud83d\\ude0', "x"),
        ('{"input": "x\\ud83d\\ude00', "x\U0001f600"),
        ('{"input": "x\\', "x"),
        ('{"input": "x"', "x"),
        ('{"input": ', '{"input": '),
    ],
)
def test_custom_call_that_is_cut_has_the_beginning_of_its_input(cut, text):
    output = OutputItems("resp_1", {"sh": Offered("custom", "sh")}, carries=False)
    output.add(Parsed(tool_calls=[ToolCallDelta(0, "call_1", "sh", cut)]), ())
    events = output.end(complete=False)
    assert (output.items[0]["status"], output.items[0]["input"]) == ("incomplete", text)
    assert events.count(b"custom_tool_call_input.done") == 2
