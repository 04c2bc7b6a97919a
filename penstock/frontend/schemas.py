"""JSON schemas without what no engine can hold an answer to.

Engines refuse a schema with a keyword that they do not know. Some say nothing where they stand: zod's
records have `propertyNames: {"type": "string"}`, which all names are. Others only matter where the schema
must be kept to: the schema of a tool or of an answer that is not `strict` is a hint, also at OpenAI.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, Final

from penstock.frontend.http.json_limits import MAX_DEPTH
from penstock.shapes import JsonObject

_SINGLE: Final = frozenset({"additionalItems", "additionalProperties", "contains", "items"})
_LISTS: Final = frozenset({"allOf", "anyOf", "items", "oneOf", "prefixItems"})
_MAPS: Final = frozenset({"$defs", "definitions", "patternProperties", "properties"})
"""Keywords whose values are schemas, lists of them, and schemas by name."""

_UNHELD: Final = frozenset(
    {
        "contains",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "else",
        "if",
        "maxContains",
        "minContains",
        "not",
        "propertyNames",
        "then",
        "unevaluatedItems",
        "unevaluatedProperties",
        "uniqueItems",
    }
)
"""Keywords that neither llguidance nor xgrammar knows."""

_HELD_FORMATS: Final = frozenset(
    {"date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"}
)
"""Values of `format` that both know."""

_LOOKS_AROUND: Final = re.compile(r"\(\?<?[=!]|\\[bB1-9]")
"""What regular expressions cannot have where they become a mask over tokens."""

_TYPES: Final = frozenset({"array", "boolean", "integer", "null", "number", "object", "string"})

_ANY_NAME: Final[tuple[Any, ...]] = (True, {}, {"type": "string"})


def without_empty_words(schema: JsonObject) -> JsonObject:
    """The schema without keywords that say nothing where they stand, and that engines do not know."""
    return _without_keywords(schema, _says_nothing)


def loosened(schema: JsonObject) -> JsonObject:
    """The schema without all that no engine can hold a text to. What fits the schema fits this one."""
    return _without_keywords(schema, _is_unheld)


def type_alone(schema: JsonObject) -> JsonObject:
    """The widest schema for a hint that no engine can compile: only whether it is an object, a list, ..."""
    return {"type": schema.get("type", "object")}


def is_well_formed(schema: JsonObject) -> bool:
    """Whether there are schemas wherever JSON Schema wants some, and only types that there are."""
    left: list[Any] = [schema]
    while left:
        part = left.pop()
        if not isinstance(part, dict | bool):
            return False
        if isinstance(part, dict):
            types = part.get("type", [])
            kinds = types if isinstance(types, list) else [types]
            if not all(isinstance(kind, str) and kind in _TYPES for kind in kinds):
                return False
            left += _inner_schemas(part)
    return True


def _inner_schemas(schema: JsonObject) -> Iterator[Any]:
    for keyword, value in schema.items():
        if keyword in _MAPS and isinstance(value, dict):
            yield from value.values()
        elif keyword in _LISTS and isinstance(value, list):
            yield from value
        elif keyword in _SINGLE:
            yield value


def _says_nothing(keyword: str, value: Any, schema: JsonObject) -> bool:
    if keyword == "propertyNames":
        return value in _ANY_NAME
    return keyword == "uniqueItems" and value is False


def _is_unheld(keyword: str, value: Any, schema: JsonObject) -> bool:
    match keyword:
        case "format":
            return not isinstance(value, str) or value not in _HELD_FORMATS
        case "pattern":
            return isinstance(value, str) and _LOOKS_AROUND.search(value) is not None
        case "minProperties" | "maxProperties":  # llguidance counts only where there is no choice
            names, required = schema.get("properties"), schema.get("required")
            if not isinstance(names, dict) or not names:
                return False
            all_required = isinstance(required, list) and all(name in required for name in names)
            return not all_required
        case _:
            return keyword in _UNHELD


def _without_keywords(
    schema: JsonObject, drops: Callable[[str, Any, JsonObject], bool], depth: int = 0
) -> JsonObject:
    """What is nested too deep stays as it is: it will be refused for that."""
    if depth > MAX_DEPTH:
        return schema

    def inner(value: Any) -> Any:
        return _without_keywords(value, drops, depth + 1) if isinstance(value, dict) else value

    kept: JsonObject = {}
    for keyword, value in schema.items():
        if drops(keyword, value, schema):
            continue
        if keyword in _MAPS and isinstance(value, dict):
            value = {name: inner(part) for name, part in value.items()}
        elif keyword in _LISTS and isinstance(value, list):
            value = [inner(part) for part in value]
        elif keyword in _SINGLE:
            value = inner(value)
        kept[keyword] = value
    return kept
