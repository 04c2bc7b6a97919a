"""What a newcomer reads when a field is wrong."""

import json

import pytest

from penstock.errors import RequestRejected
from penstock.frontend.anthropic import decode_messages
from penstock.frontend.openai import decode_chat, decode_completion
from penstock.frontend.responses_api.request_body import decode_response_request

HI = [{"role": "user", "content": "Hi"}]


def refusal(decoder=decode_chat, **fields):
    body = {"model": "m", ("prompt" if decoder is decode_completion else "messages"): HI, **fields}
    with pytest.raises(RequestRejected) as raised:
        decoder(json.dumps(body).encode())
    return raised.value


def said(decoder=decode_chat, **fields):
    error = refusal(decoder, **fields)
    assert error.code == "invalid_value"
    return error.message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": "0"}, "`temperature` must be a number, not a string."),
        ({"temperature": 3}, "`temperature` must be a number, at most 2."),
        ({"top_p": 0}, "`top_p` must be a number, more than 0."),
        ({"max_tokens": True}, "`max_tokens` must be an integer, not a boolean."),
        ({"max_tokens": 0}, "`max_tokens` must be an integer, at least 1."),
        ({"max_tokens": 5.5}, "`max_tokens` must be an integer, not a fraction."),
        ({"stream": "true"}, "`stream` must be true or false, not a string."),
        ({"stop": 5}, "`stop` must be a string or a list, not an integer."),
        ({"stop": ""}, "`stop` must be a string of at least 1 character."),
        ({"stop": ["x"] * 17}, "`stop` must be a list of at most 16 items."),
        ({"stop": ["x" * 4097]}, "`stop[0]` must be a string of at most 4096 characters."),
        ({"messages": "Hi"}, "`messages` must be a list, not a string."),
        ({"messages": {}}, "`messages` must be a list, not an object."),
        (
            {"messages": [{"role": "tool_use", "content": ""}]},
            "`messages[0].role` must be one of"
            " `assistant`, `developer`, `function`, `system`, `tool`, `user`,"
            " not 'tool_use'.",
        ),
        (
            {"tools": [{"function": {"name": "f"}}], "tool_choice": "any"},
            "`tool_choice` must be one of `auto`, `none`, `required`, an object, not 'any'.",
        ),
        (
            {"tools": [{"type": "custom", "function": {"name": "f"}}]},
            "`tools[0].type` must be `function`, not 'custom'.",
        ),
        (
            {"response_format": {"type": "xml"}},
            "`response_format.type` must be one of `text`, `json_object`, `json_schema`, `structural_tag`,"
            " not 'xml'.",
        ),
        (
            {"response_format": {"type": None}},
            "`response_format.type` must be one of `text`, `json_object`, `json_schema`, `structural_tag`.",
        ),
        ({"structured_outputs": {"regexp": "a"}}, "`structured_outputs` has no field `regexp`."),
        ({"nvext": {"top_k": "x"}}, "`nvext.top_k` must be an integer, not a string."),
        ({"nvext": {"x": 1}}, "`nvext` has no field `x`."),
        (
            {"logit_bias": {"bad1": 50, "bad2": 20, "7": 1}},
            "`logit_bias`: 'bad1', 'bad2' must be token ids, as in `{\"42\": 5}`.",
        ),
        ({"logit_bias": {"5": 101, "6": 1}}, "`logit_bias`: '5' must have numbers from -100 to 100."),
        (
            {"logit_bias": {"99999999999": 1}},
            "`logit_bias`: '99999999999' must be token ids, as in `{\"42\": 5}`.",
        ),
        ({"logit_bias": {"٣": 1}}, "`logit_bias`: '٣' must be token ids, as in `{\"42\": 5}`."),
        ({"logit_bias": {"5": "x"}}, "`logit_bias`: '5' must have numbers from -100 to 100."),
        ({"logit_bias": [5]}, "`logit_bias` must be an object, not a list."),
        (
            {"logit_bias": {str(n): 1 for n in range(1025)}},
            "`logit_bias` must be an object of at most 1024 entries.",
        ),
    ],
)
def test_a_message_names_the_field_and_says_what_it_must_be(fields, message):
    assert said(**fields) == message


@pytest.mark.parametrize(
    ("decoder", "fields", "field"),
    [
        (decode_chat, {"model": None}, "model"),
        (decode_chat, {"messages": None}, "messages"),
        (decode_chat, {"messages": [{"role": None, "content": "Hi"}]}, "messages[0].role"),
        (decode_chat, {"tools": [{"function": None}]}, "tools[0].function"),
        (decode_completion, {"prompt": None}, "prompt"),
        (decode_messages, {"max_tokens": None}, "max_tokens"),
        (decode_response_request, {"input": [], "tool_choice": {"type": None}}, "tool_choice.type"),
    ],
)
def test_null_in_place_of_a_required_field_is_a_missing_field(decoder, fields, field):
    error = refusal(decoder, **fields)
    assert (error.code, error.field) == ("missing_field", field)
    assert error.message == f"Missing required field: `{field}`."


def test_null_among_the_items_of_a_list_is_a_wrong_item():
    assert said(stop=[None]) == "`stop[0]` must be a string, not null."


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"a": 1}, "`metadata`: each value must be a string, not an integer."),
        ({"a": None}, "`metadata`: each value must be a string, not null."),
        ({"a": "x" * 513}, "`metadata`: each value must be a string of at most 512 characters."),
        ({"a" * 65: "x"}, "`metadata`: each key must be a string of at most 64 characters."),
        ("a", "`metadata` must be an object, not a string."),
    ],
)
def test_a_wrong_entry_of_an_object_is_not_taken_for_the_object(metadata, message):
    assert said(decode_response_request, metadata=metadata) == message


def test_of_many_wrong_entries_some_are_named():
    message = said(logit_bias={f"bad{n}": 1 for n in range(9)})
    assert "'bad0', 'bad1', 'bad2', 'bad3', 'bad4' and 4 more" in message


def test_what_is_repeated_of_a_value_is_short():
    assert len(said(messages=[{"role": "x" * 100_000, "content": ""}])) < 300
    assert len(said(structured_outputs={"x" * 100_000: 1})) < 300
    assert len(said(logit_bias={"x" * 100_000: 1})) < 300


def test_the_body_itself():
    with pytest.raises(RequestRejected, match=r"^The body must be an object, not a string\.$"):
        decode_completion(b'"Hi"')
