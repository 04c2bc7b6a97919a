"""What msgspec says of a wrong body, in words that a client's author understands.

msgspec names types as Python does, and does not say which values a field may have. So its message is taken
apart, and what may stand at that place is looked up in the body's own type.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Final

import msgspec
from msgspec import inspect

from penstock.errors import RequestRejected

_AT: Final = re.compile(r"^(?P<what>.*?)(?: - at (?P<key>`key` in )?`\$\.?(?P<path>.*)`)?$", re.DOTALL)
_MISSING: Final = re.compile(r"Object missing required field `(?P<name>[^`]+)`")
_UNKNOWN: Final = re.compile(r"Object contains unknown field `(?P<name>.+)`", re.DOTALL)
_TYPE: Final = re.compile(r"Expected `(?P<types>[^`]+)`, got `(?P<got>[^`]+)`")
_NO_TAG: Final = "Expected `str`"  # msgspec's words for the type of an object that is no text
_LIMIT: Final = re.compile(
    r"Expected `(?P<type>int|float|str|array|object)`"
    r" (?P<length>of length )?(?P<sign>[<>]=?) (?P<limit>\S+)"
)
_CHOICE: Final = re.compile(r"Invalid (?:enum )?value (?P<got>.*)", re.DOTALL)
_VALUE: Final = "[...]"  # msgspec's word for any value of an object
_STEP: Final = re.compile(r"\[\d*\.*\]|[^.\[\]]+")

_WORDS: Final = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
}
_GOT: Final = _WORDS | {"bool": "a boolean"}
_UNITS: Final = {"str": "characters", "array": "items", "object": "entries"}
_SIGNS: Final = {">=": "at least", "<=": "at most", ">": "more than", "<": "less than"}
_MAX_GOT_CHARS: Final = 60
_MAX_NAMED: Final = 5  # wrong entries that a message names


_type_of = cache(inspect.type_info)


def rejected(
    error: msgspec.ValidationError, kind: type[msgspec.Struct], prefix: str = ""
) -> RequestRejected:
    """The 400 for a body, or the object at `prefix`, that is not of this kind. Its field is the place as
    OpenAI's `param`."""
    match = _AT.match(str(error))
    what, path = (match["what"], match["path"] or "") if match else (str(error), "")
    entry = "each key" if match and match["key"] else "each value" if path.endswith(_VALUE) else ""
    path = prefix + path if path else prefix.removesuffix(".")
    missing = _MISSING.fullmatch(what)
    if missing:
        path = f"{path}.{missing['name']}" if path else missing["name"]
    if missing or (path and not path.endswith("]") and _got_null(what)):
        return RequestRejected(f"Missing required field: `{path}`.", code="missing_field", field=path)
    allowed = _allowed(_type_of(kind), path.removeprefix(prefix)) if path else []
    path = path.removesuffix(_VALUE)
    where = f"`{path}`" if path else "the body"
    # Which entry of an object is wrong is not known.
    message = f"{where}: {entry} {_must(what, allowed)}." if entry else f"{where} {_must(what, allowed)}."
    return RequestRejected(message[:1].upper() + message[1:], field=path or None)


def _got_null(what: str) -> bool:
    """Whether null was found where it is not allowed: null means the same as leaving a field out."""
    match = _TYPE.fullmatch(what)
    return match is not None and match["got"] == "null"


def wrong_entries(field: str, entries: list[str], expected: str) -> RequestRejected:
    """The 400 for an object of which these entries are wrong."""
    named = ", ".join(repr(entry[:_MAX_GOT_CHARS]) for entry in entries[:_MAX_NAMED])
    more = f" and {len(entries) - _MAX_NAMED} more" if len(entries) > _MAX_NAMED else ""
    return RequestRejected(f"`{field}`: {named}{more} {expected}.", field=field)


def _must(what: str, allowed: list[str]) -> str:
    """msgspec's complaint as the rest of a sentence that begins with a field's name."""
    if what == _NO_TAG and allowed:
        return f"must be {_one_of(allowed)}"
    if match := _CHOICE.fullmatch(what):
        return f"must be {_one_of(allowed)}, not {match['got'][:_MAX_GOT_CHARS]}"
    if match := _TYPE.fullmatch(what):
        types = [name for name in match["types"].split(" | ") if name != "null"]
        got = "a fraction" if match["got"] == "float" and "int" in types else _GOT.get(match["got"])
        if allowed and "str" in types:
            return f"must be {_one_of(allowed)}, not {got or match['got']}"
        return f"must be {' or '.join(_WORDS.get(name, name) for name in types)}, not {got or match['got']}"
    if match := _LIMIT.fullmatch(what):
        name, limit = match["type"], match["limit"].removesuffix(".0")
        bound = f"{_SIGNS[match['sign']]} {limit}"
        if match["length"]:
            unit = _UNITS[name] if limit != "1" else _UNITS[name].removesuffix("s")
            return f"must be {_WORDS[name]} of {bound} {unit}"
        return f"must be {_WORDS[name]}, {bound}"
    if match := _UNKNOWN.fullmatch(what):
        return f"has no field `{match['name'][:_MAX_GOT_CHARS]}`"
    return f"is invalid: {what}"


def _one_of(allowed: list[str]) -> str:
    return f"one of {', '.join(allowed)}" if len(allowed) > 1 else "".join(allowed)


def _allowed(kind: inspect.Type, path: str) -> list[str]:
    """The texts that may stand at this place of a type, and "an object" where one may be there in their
    place; empty where any text may."""
    kinds = [kind]
    for step in _STEP.findall(path):
        kinds = [inner for outer in kinds for inner in _inside(outer, step)]
    options = [option for found in kinds for option in _options(found)]
    texts = [f"`{text}`" for option in options for text in _texts(option)]
    return [*texts, "an object"] if texts and any(map(_is_object, options)) else texts


def _inside(kind: inspect.Type, step: str) -> Iterator[inspect.Type]:
    """What is one step further into a type: at a field's name, or at `[index]`."""
    match kind:
        case inspect.Metadata():
            yield from _inside(kind.type, step)
        case inspect.UnionType():
            yield from (inner for option in kind.types for inner in _inside(option, step))
        case inspect.ListType() if step.startswith("["):
            yield kind.item_type
        case inspect.StructType():
            if step == kind.tag_field:
                yield inspect.LiteralType((kind.tag,))
            yield from (field.type for field in kind.fields if field.encode_name == step)


def _options(kind: inspect.Type) -> tuple[inspect.Type, ...]:
    return kind.types if isinstance(kind, inspect.UnionType) else (kind,)


def _texts(kind: inspect.Type) -> tuple[object, ...]:
    return kind.values if isinstance(kind, inspect.LiteralType) else ()


def _is_object(kind: inspect.Type) -> bool:
    return isinstance(kind, inspect.StructType)
