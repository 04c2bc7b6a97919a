"""What an answer must look like, from either field."""

import json
import random

import pytest

from penstock.errors import Rejection, RequestRejected
from penstock.frontend.chat import Chat
from penstock.frontend.sampling import sampling_of
from penstock.frontend.structured import MAX_SPEC_CHARS
from penstock.shapes import StructuredOutput

DEEP = "[" * 65 + "]" * 65
SCHEMA = {"type": "object", "properties": {"b": {"enum": [None]}, "a": {}}}

SET = {"type": "array", "uniqueItems": True}


@pytest.fixture
def structured_of(byte_level, view_of):
    def structured(able=True, **fields):
        body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **fields}
        view = view_of(byte_level, structured_output=able)
        wanted = Chat.decode(json.dumps(body).encode()).wanted
        return sampling_of(wanted, view.card, random.Random(1)).structured

    return structured


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": None, "structured_outputs": None}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, StructuredOutput("json_object")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
            StructuredOutput("json", json.dumps(SCHEMA, separators=(",", ":"))),
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SET}}},
            StructuredOutput("json", '{"type":"array"}'),
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": SET, "strict": True},
                }
            },
            StructuredOutput("json", '{"type":"array","uniqueItems":true}'),
        ),
        (
            {"structured_outputs": {"json": SET}},
            StructuredOutput("json", '{"type":"array","uniqueItems":true}'),
        ),
        (
            {"response_format": {"type": "json_object", "schema": SCHEMA}},
            StructuredOutput("json", json.dumps(SCHEMA, separators=(",", ":"))),
        ),
        (
            {"structured_outputs": {"json": {"type": "object", "propertyNames": {"type": "string"}}}},
            StructuredOutput("json", '{"type":"object"}'),
        ),
        (
            {"response_format": {"type": "structural_tag", "triggers": ["<"], "structures": []}},
            StructuredOutput(
                "structural_tag", '{"type":"structural_tag","structures":[],"triggers":["<"]}'
            ),
        ),
        ({"structured_outputs": {"json": {}}}, StructuredOutput("json", "{}")),
        ({"structured_outputs": {"json": "{ }"}}, StructuredOutput("json", "{ }")),
        ({"structured_outputs": {"regex": "a+"}}, StructuredOutput("regex", "a+")),
        ({"structured_outputs": {"choice": ["a", "\u00e9"]}}, StructuredOutput("choice", '["a","\u00e9"]')),
        ({"structured_outputs": {"grammar": "root ::= x"}}, StructuredOutput("grammar", "root ::= x")),
        ({"structured_outputs": {"json_object": True}}, StructuredOutput("json_object")),
        (
            {"structured_outputs": {"json_object": True, "disable_any_whitespace": True}},
            StructuredOutput("json_object", disable_any_whitespace=True),
        ),
        (
            {"structured_outputs": {"json": {}, "whitespace_pattern": " ?"}},
            StructuredOutput("json", "{}", whitespace_pattern=" ?"),
        ),
        (
            {"structured_outputs": {"regex": "a", "disable_any_whitespace": False}},
            StructuredOutput("regex", "a"),
        ),
        (
            {"response_format": {"type": "text"}, "structured_outputs": {"regex": "a"}},
            StructuredOutput("regex", "a"),
        ),
    ],
)
def test_what_is_asked_for(structured_of, fields, expected):
    assert structured_of(**fields) == expected


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "grammar": "b"}}, "structured_outputs"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
        ),
        ({"structured_outputs": {"regex": "a" * (MAX_SPEC_CHARS + 1)}}, "structured_outputs"),
        ({"structured_outputs": {"json": DEEP}}, "structured_outputs"),
        (
            {"structured_outputs": {"json": DEEP, "disable_additional_properties": True}},
            "structured_outputs",
        ),
        (
            {"structured_outputs": {"regex": "a", "disable_any_whitespace": True}},
            "structured_outputs.disable_any_whitespace",
        ),
        (
            {"structured_outputs": {"choice": ["a"], "whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern",
        ),
        ({"structured_outputs": {"json": "[" * 100_000}}, "structured_outputs"),
        ({"structured_outputs": {"json": "no JSON"}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": '{"x":' + DEEP + "}"}}, "structured_outputs"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": json.loads('{"x":' + DEEP + "}")},
                }
            },
            "response_format",
        ),
    ],
)
def test_what_makes_no_sense_is_named(structured_of, fields, field):
    with pytest.raises(RequestRejected) as raised:
        structured_of(**fields)
    assert (raised.value.kind, raised.value.field) == (Rejection.INVALID, field)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ],
)
def test_an_engine_that_cannot_is_not_asked(structured_of, fields, field):
    assert structured_of(able=False, response_format={"type": "text"}) is None
    with pytest.raises(RequestRejected) as raised:
        structured_of(able=False, **fields)
    assert (raised.value.field, raised.value.code) == (field, "unsupported_value")


@pytest.mark.parametrize("as_text", [False, True])
def test_objects_have_no_properties_that_the_schema_does_not_name(structured_of, as_text):
    inner = {"type": "object", "patternProperties": {"a": {}}}
    open_one = {"type": "object", "properties": {}, "additionalProperties": True}
    schema = {"properties": {"x": {"anyOf": [inner, open_one]}, "y": {"type": "object"}}}
    given = json.dumps(schema) if as_text else schema
    wanted = structured_of(structured_outputs={"json": given, "disable_additional_properties": True})
    inner["additionalProperties"] = schema["additionalProperties"] = False
    assert json.loads(wanted.spec) == schema
