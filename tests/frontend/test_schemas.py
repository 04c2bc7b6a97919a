"""What is left out of a schema, and that everything else stays."""

import pytest

from penstock.frontend.http.json_limits import MAX_DEPTH
from penstock.frontend.schemas import is_well_formed, loosened, type_alone, without_empty_words

STRING = {"type": "string"}


EMPTY = [{"propertyNames": STRING}, {"propertyNames": {}}, {"propertyNames": True}, {"uniqueItems": False}]


@pytest.mark.parametrize("empty", EMPTY)
def test_keyword_that_says_nothing_is_left_out(empty):
    held = {"type": "object", "additionalProperties": STRING}
    schema = {**held, **empty, "properties": {"a": empty}}
    assert without_empty_words(schema) == {**held, "properties": {"a": {}}}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "propertyNames": {"pattern": "^a"}},
        {"type": "array", "uniqueItems": True},
        {"properties": {"propertyNames": STRING, "uniqueItems": {"const": False}}},
        {"enum": [{"uniqueItems": False}], "default": {"propertyNames": {}}},
    ],
)
def test_what_says_something_stays_where_it_must_be_held(schema):
    assert without_empty_words(schema) == schema


@pytest.mark.parametrize(
    "unheld",
    [
        {"uniqueItems": True},
        {"not": STRING},
        {"if": {"required": ["a"]}, "then": {"required": ["b"]}, "else": {}},
        {"contains": STRING, "minContains": 1},
        {"propertyNames": {"pattern": "^a"}},
        {"dependentRequired": {"a": ["b"]}},
        {"format": "color"},
        {"format": {}},
        {"pattern": "^(?!a).*$"},
        {"pattern": r"\bword\b"},
        {"pattern": r"(a)\1"},
    ],
)
@pytest.mark.parametrize(
    "around",
    [
        lambda inner: inner,
        lambda inner: {"items": inner},
        lambda inner: {"additionalProperties": inner},
        lambda inner: {"properties": {"a": inner}},
        lambda inner: {"$defs": {"A": inner}},
        lambda inner: {"anyOf": [STRING, inner]},
        lambda inner: {"prefixItems": [inner], "items": [inner]},
    ],
)
def test_what_no_engine_holds_is_left_out_of_what_is_only_a_hint(unheld, around):
    held = {"type": "string", "title": "T"}
    assert loosened(around({**held, **unheld})) == around(held)


@pytest.mark.parametrize("keyword", ["minProperties", "maxProperties"])
@pytest.mark.parametrize(
    ("schema", "held"),
    [
        ({}, True),
        ({"properties": {}}, True),
        ({"properties": {"a": STRING}, "required": ["a", "b"]}, True),
        ({"properties": {"a": STRING}}, False),
        ({"properties": {"a": STRING, "b": STRING}, "required": ["a"]}, False),
        ({"properties": {"a": STRING}, "required": "a"}, False),
        ({"properties": 7}, True),
    ],
)
def test_properties_are_counted_where_none_may_be_left_out(keyword, schema, held):
    assert (keyword in loosened({**schema, keyword: 1})) is held


def test_names_of_properties_and_values_are_no_keywords():
    schema = {
        "properties": {"not": STRING, "if": {"const": {"not": 1}}, "format": {"enum": ["color"]}},
        "required": ["not"],
        "additionalProperties": False,
        "pattern": "^a+$",
        "format": "date",
        "examples": [{"uniqueItems": True}],
    }
    assert loosened(schema) == schema


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({}, True),
        ({"type": ["string", "null"], "items": False, "enum": ["set", {"type": "set"}]}, True),
        ({"$defs": {"A": {"anyOf": [STRING, True]}}, "multipleOf": 2}, True),
        ({"properties": {"type": STRING, "items": STRING}}, True),
        ({"type": "set"}, False),
        ({"type": ["string", "set"]}, False),
        ({"type": 7}, False),
        ({"type": [{}]}, False),
        ({"type": None}, False),
        ({"properties": {"a": "string"}}, False),
        ({"items": [STRING, {"type": "set"}]}, False),
        ({"additionalProperties": {"not": {}, "oneOf": [None]}}, False),
    ],
)
def test_a_schema_has_schemas_where_they_must_be(schema, expected):
    assert is_well_formed(schema) is expected


def test_the_type_is_what_is_left_of_a_hint():
    assert type_alone({"type": ["array", "null"], "items": STRING}) == {"type": ["array", "null"]}
    assert type_alone({"$ref": "#/$defs/A"}) == {"type": "object"}


def test_nesting_beyond_the_limit_is_left_to_the_check_of_it():
    deep = {}
    for _ in range(20 * MAX_DEPTH):
        deep = {"items": deep}
    assert loosened(deep) == deep
