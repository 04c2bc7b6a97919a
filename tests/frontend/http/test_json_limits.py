"""Bodies that are cheap to send and dear to read."""

import json

import pytest

from penstock.errors import RequestRejected
from penstock.frontend.http.json_limits import (
    MAX_CONTAINERS,
    MAX_DEPTH,
    MAX_VALUES,
    check_depth,
    check_size,
)
from penstock.frontend.openai import decode_chat, decode_completion


def nested(depth):
    value = {}
    for level in range(depth - 1):
        value = {"a": value} if level % 2 else [value]
    return value


@pytest.mark.parametrize(
    "item", [b"[]", b"{}", b'{"a":[1]}', b"1", b'"a"', rb'"\""', rb'"\\"', b'"[{,"'], ids=repr
)
def test_a_body_with_too_many_values_is_refused(item):
    body = b'{"model":"m","prompt":[%s]}' % b",".join([item] * (MAX_VALUES + 10))
    with pytest.raises(RequestRejected, match="values"):
        check_size(body)


def test_what_stands_in_strings_does_not_count():
    text = 'call(x[0], {"a": "\\\\"}, "b", [{}]);\n' * (MAX_VALUES // 4)
    check_size(json.dumps({"model": "m", "prompt": text}).encode())
    check_size(b'"' + b"\\" * (4 * MAX_VALUES) + b'"')


def test_the_longest_prompts_fit():
    ids = list(range(1_000_000))
    assert decode_completion(json.dumps({"model": "m", "prompt": ids}).encode()).prompts == [ids]
    schema = {"type": "object", "properties": {f"p{n}": {"type": "string", "enum": []} for n in range(20)}}
    tools = [{"type": "function", "function": {"name": f"f{n}", "parameters": schema}} for n in range(1024)]
    messages = [{"role": "user", "content": [{"type": "text", "text": "x"}]}] * 4096
    decode_chat(json.dumps({"model": "m", "messages": messages, "tools": tools}).encode())


def test_half_a_body_is_no_error_of_this_check():
    check_size(b'{"model":"m","prompt":"' + b"[" * (MAX_CONTAINERS + 1))


@pytest.mark.parametrize("value", [None, 1, "x", {}, [], nested(MAX_DEPTH)])
def test_depth_within(value):
    check_depth(value, "f")


CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
DEEP = nested(MAX_DEPTH + 1)
DEEP = DEEP if isinstance(DEEP, dict) else {"a": DEEP}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"chat_template_kwargs": DEEP}, "chat_template_kwargs"),
        (
            {"tools": [{"function": {"name": "f"}}, {"function": {"name": "f", "parameters": DEEP}}]},
            "tools[1].function.parameters",
        ),
    ],
)
def test_a_field_nested_too_deeply_is_refused_by_name(fields, field):
    with pytest.raises(RequestRejected, match="nested to more than 64 levels") as raised:
        decode_chat(json.dumps({**CHAT, **fields}).encode())
    assert raised.value.field == field


def test_deeper_than_a_decoder_goes():
    for opening in (b"[", b'{"a":'):
        with pytest.raises(RequestRejected, match="not valid JSON"):
            decode_chat(b'{"model":"m","zzz":' + opening * 90_000)
