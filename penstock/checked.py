"""Foreign values into structs, with one readable line for every field that is wrong.

msgspec stops at the first error and does not name dict keys; people who write YAML and flags deserve all of
them at once, with the path, what was expected, and what was there:

    local.yaml: spec.services.PrefillWorker.replicas: expected an integer >= 0, got "two"
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

T = TypeVar("T")

_SHOWN_CHARS = 60  # of a wrong value in a message
_type_of = cache(inspect.type_info)  # which takes a hundred times longer than looking at a value


def problems(value: Any, expected: type | inspect.Type, path: str) -> Iterator[str]:
    """What is wrong with `value`, as `path: expected ..., got ...` lines.

    A struct's class variable `ACCEPTED` may name further fields that are known but not looked into.
    Nulls count as absent fields, as in Kubernetes.
    """
    kind = expected if isinstance(expected, inspect.Type) else _type_of(expected)
    match kind:
        case inspect.Metadata():
            yield from problems(value, kind.type, path)
        case inspect.StructType():
            yield from _struct_problems(value, kind, path)
        case inspect.DictType():
            if not isinstance(value, dict):
                yield f"{path}: expected an object, got {shown(value)}"
                return
            for key, item in value.items():
                if not isinstance(key, str):
                    yield f"{path}: expected a string as name, got {shown(key)}"
                yield from problems(item, kind.value_type, f"{path}.{key}")
        case inspect.ListType() | inspect.VarTupleType():
            if not isinstance(value, list):
                yield f"{path}: expected a list, got {shown(value)}"
                return
            for index, item in enumerate(value):
                yield from problems(item, kind.item_type, f"{path}[{index}]")
        case inspect.AnyType():
            return
        case inspect.UnionType():
            yield from _union_problems(value, kind, path)
        case _:
            if not _fits(value, kind):
                yield f"{path}: expected {described(kind)}, got {shown(value)}"


def described(kind: inspect.Type) -> str:
    """A type in words: `an integer >= 0`, `one of kv, random`."""
    match kind:
        case inspect.Metadata():
            return described(kind.type)
        case inspect.IntType() | inspect.FloatType():
            noun = "an integer" if isinstance(kind, inspect.IntType) else "a number"
            if kind.ge is not None and kind.le is not None:
                return f"{noun} from {kind.ge:g} to {kind.le:g}"
            bounds = ((">=", kind.ge), (">", kind.gt), ("<=", kind.le), ("<", kind.lt))
            limits = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)
            return f"{noun} {limits}".rstrip()
        case inspect.LiteralType():
            return "one of " + ", ".join(str(value) for value in kind.values)
        case inspect.EnumType():
            return "one of " + ", ".join(str(member.value) for member in kind.cls)
        case inspect.BoolType():
            return "true or false"
        case inspect.StrType():
            return "a string"
        case inspect.UnionType():
            return " or ".join(described(t) for t in kind.types if not isinstance(t, inspect.NoneType))
    raise TypeError(f"no words for {kind}")


def shown(value: Any) -> str:
    """A wrong value as it stood in the file, cut to a readable length."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 3] + "..."


def suggestion(name: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` for the nearest known name; nothing when none is near. Never the opposite
    of what was asked, as `--no-cache` is of `--cache`."""
    folded = {candidate.lower(): candidate for candidate in known if _negates(candidate) == _negates(name)}
    nearest = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.7)
    return f" (did you mean {folded[nearest[0]]}?)" if nearest else ""


def _negates(name: str) -> bool:
    return name.lower().lstrip("-").startswith(("no-", "disable-"))


def without_nulls(value: Any) -> Any:
    """`value` less all dict entries that are null."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _struct_problems(value: Any, kind: inspect.StructType, path: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{path}: expected an object, got {shown(value)}"
        return
    fields = {field.encode_name: field for field in kind.fields}
    accepted: frozenset[str] = getattr(kind.cls, "ACCEPTED", frozenset())
    for name in value:
        if name not in fields and name not in accepted:
            near = suggestion(str(name), (*fields, *accepted))
            yield f"{path}.{name}: unknown field{near}"
    for name, field in fields.items():
        if value.get(name) is not None:
            yield from problems(value[name], field.type, f"{path}.{name}")
        elif field.required:
            yield f"{path}.{name}: missing"


def _union_problems(value: Any, kind: inspect.UnionType, path: str) -> Iterator[str]:
    others = [option for option in kind.types if not isinstance(option, inspect.NoneType)]
    if value is None and len(others) < len(kind.types):
        return
    if len(others) == 1:
        yield from problems(value, others[0], path)
    elif not any(_fits(value, option) for option in others):
        yield f"{path}: expected {described(kind)}, got {shown(value)}"


def _fits(value: Any, kind: inspect.Type) -> bool:
    match kind:
        case inspect.Metadata():
            return _fits(value, kind.type)
        case inspect.IntType():
            return isinstance(value, int) and not isinstance(value, bool) and _within(value, kind)
        case inspect.FloatType():
            numeric = isinstance(value, int | float) and not isinstance(value, bool)
            return numeric and math.isfinite(value) and _within(value, kind)
        case inspect.StrType():
            return isinstance(value, str)
        case inspect.BoolType():
            return isinstance(value, bool)
        case inspect.LiteralType():
            return value in kind.values
        case inspect.EnumType():
            return value in [member.value for member in kind.cls]
    raise TypeError(f"cannot check {kind}")


def _within(value: float, kind: inspect.IntType | inspect.FloatType) -> bool:
    return (
        (kind.ge is None or value >= kind.ge)
        and (kind.gt is None or value > kind.gt)
        and (kind.le is None or value <= kind.le)
        and (kind.lt is None or value < kind.lt)
    )


def field_path(error: str, struct: type) -> str:
    """A msgspec error, `Expected ... - at $.load[8][0]`, with the field in front and by its name,
    `step.load.rates.step_ms: Expected ...`: msgspec numbers the fields of structs that travel as arrays."""
    problem, _, path = error.rpartition(" - at `")
    names = [struct.__name__.lower()]
    kind: inspect.Type = _type_of(struct)
    for name, number in re.findall(r"\.(\w+)|\[([\d.]*)\]", path):
        kind = _within_union(kind)
        fields = kind.fields if isinstance(kind, inspect.StructType) else ()
        if number.isdigit() and int(number) < len(fields):
            name = fields[int(number)].encode_name
        names.append(f".{name}" if name else f"[{number}]")
        field = next((field for field in fields if field.encode_name == name), None)
        kind = field.type if field is not None else getattr(kind, "item_type", inspect.AnyType())
    return f"{''.join(names)}: {problem}" if problem else error


def _within_union(kind: inspect.Type) -> inspect.Type:
    """The type itself, of one with limits or one that may be null."""
    while isinstance(kind, inspect.Metadata | inspect.UnionType):
        options = kind.types if isinstance(kind, inspect.UnionType) else (kind.type,)
        kind = next(it for it in options if not isinstance(it, inspect.NoneType))
    return kind


def converted(value: Any, struct: type[T]) -> T:
    """`value`, in which `problems` found none, as a `struct`."""
    return msgspec.convert(without_nulls(value), struct)
