"""Flags as text, from a command line, a manifest or the environment, into options (config.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from penstock.checked import problems, suggestion
from penstock.errors import ConfigError
from penstock.options.config import CommonOptions, FrontendOptions, OperatorOptions, WorkerOptions

Options = TypeVar("Options", FrontendOptions, WorkerOptions, OperatorOptions)


class Flag(msgspec.Struct, frozen=True):
    """One field of an options struct, as a command line sees it."""

    field: str
    name: str  # with dashes, without the leading two
    type: inspect.Type
    default: Any
    required: bool
    help: str
    variables: tuple[str, ...]  # environment, the first one set counts
    protects: bool  # set to nothing, it is an error

    @property
    def value_shown(self) -> str:
        """What stands for a value in help: `N`, `X`, `TEXT`, or the choices."""
        match _bare(self.type):
            case inspect.LiteralType() as literal:
                return "|".join(str(value) for value in literal.values)
            case inspect.EnumType() as enum:
                return "|".join(str(member.value) for member in enum.cls)
            case inspect.IntType():
                return "N"
            case inspect.FloatType():
                return "X"
        return "TEXT"


@cache
def flags_of(options: type[FrontendOptions | WorkerOptions | OperatorOptions]) -> Mapping[str, Flag]:
    """All flags of an options struct by name, its own before the common ones."""
    described_fields: list[Flag] = []
    common = set(CommonOptions.__struct_fields__)
    kind = inspect.type_info(options)
    assert isinstance(kind, inspect.StructType)
    for field in sorted(kind.fields, key=lambda field: field.name in common):
        if field.name == "engine_args":
            continue
        schema, extra = _metadata(field.type)
        described_fields.append(
            Flag(
                field.name,
                field.name.replace("_", "-"),
                field.type,
                None if field.required else field.default,
                field.required,
                schema.get("description", ""),
                extra.get("env", ()),
                extra.get("protects", False),
            )
        )
    return {flag.name: flag for flag in described_fields}


def build_options(
    options: type[Options],
    given: Mapping[str, str],
    environ: Mapping[str, str],
    engine_args: Sequence[str] = (),
) -> Options:
    """Options from flags as text (`{"http-port": "8000"}`) and, below them, environment variables.

    Raises:
        ConfigError: a line for each flag that is unknown, missing, or has a wrong value.
    """
    flags = flags_of(options)
    known = [f"--{name}" for name in flags]
    values: dict[str, Any] = {}
    wrong = [
        f"--{name}: unknown flag{suggestion('--' + name, known)}" for name in given if name not in flags
    ]
    for name, flag in flags.items():
        source, text = _source_of(flag, given, environ)
        if text is None:
            if flag.required:
                wrong.append(f"--{name}: missing")
            continue
        if flag.protects and not text.strip():
            wrong.append(f"{source}: is set to nothing; set it, or leave it out to go without")
            continue
        value = _from_text(text, flag.type)
        wrong += problems(value, flag.type, source)
        values[flag.field] = value
    if wrong:
        raise ConfigError("\n".join(wrong))
    if engine_args:
        values["engine_args"] = tuple(engine_args)
    return msgspec.convert(values, options)


def _source_of(flag: Flag, given: Mapping[str, str], environ: Mapping[str, str]) -> tuple[str, str | None]:
    if flag.name in given:
        return f"--{flag.name}", given[flag.name]
    for variable in flag.variables:
        if environ.get(variable) or (flag.protects and variable in environ):
            return variable, environ[variable]
    return f"--{flag.name}", None


def _from_text(text: str, kind: inspect.Type) -> Any:
    """The value that a text stands for; the text itself when it does not fit, for `problems` to name."""
    bare = _bare(kind)
    if isinstance(bare, inspect.IntType | inspect.FloatType):
        number = int if isinstance(bare, inspect.IntType) else float
        try:
            return number(text)
        except ValueError:
            return text
    return text


def _bare(kind: inspect.Type) -> inspect.Type:
    """A type without its metadata and without None."""
    if isinstance(kind, inspect.Metadata):
        return _bare(kind.type)
    if isinstance(kind, inspect.UnionType):
        return _bare(next(option for option in kind.types if not isinstance(option, inspect.NoneType)))
    return kind


def _metadata(kind: inspect.Type) -> tuple[dict[str, Any], dict[str, Any]]:
    if not isinstance(kind, inspect.Metadata):
        return {}, {}
    return kind.extra_json_schema or {}, kind.extra or {}
