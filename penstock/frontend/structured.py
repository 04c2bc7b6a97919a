"""What an answer must look like: OpenAI's `response_format`, and `structured_outputs`, vLLM's own field."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from penstock.errors import RequestRejected
from penstock.frontend.http.json_limits import check_depth
from penstock.frontend.unserved import unsupported
from penstock.shapes import JsonObject, StructuredOutput

MAX_SPEC_CHARS: Final = 256 * 1024
"""Of a schema, grammar or list of choices: an engine compiles it before the first token."""

Text = Annotated[str, Meta(min_length=1)]


class TextFormat(msgspec.Struct, tag_field="type", tag="text"):
    """Anything."""


class JsonObjectFormat(msgspec.Struct, tag_field="type", tag="json_object"):
    """Some JSON object."""


class NamedSchema(msgspec.Struct):
    name: Text
    schema: JsonObject
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(msgspec.Struct, tag_field="type", tag="json_schema"):
    """JSON of this schema."""

    json_schema: NamedSchema


class StructuralTagFormat(msgspec.Struct, tag_field="type", tag="structural_tag", omit_defaults=True):
    """Text in which some places have a form; in either of the two shapes that xgrammar takes."""

    format: Any = None
    structures: list[JsonObject] | None = None
    triggers: list[str] | None = None


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat | StructuralTagFormat


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Exactly one of these."""

    json: str | JsonObject | None = None  # a JSON schema
    regex: Text | None = None
    choice: Annotated[list[Text], Meta(min_length=1)] | None = None
    grammar: Text | None = None
    json_object: bool | None = None
    structural_tag: Text | None = None

    # Known to vLLM, which takes them from its flag --structured-outputs-config and not from requests.
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: str | None = None


_OPTIONS: Final = ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")


def constraint(format: ResponseFormat | None, outputs: StructuredOutputs | None) -> StructuredOutput | None:
    """What the two fields ask for; None when it is nothing.

    Raises RequestRejected for constraints that exclude each other, or that are too long or too deep.
    """
    if isinstance(format, TextFormat):
        format = None
    if format is not None and outputs is not None:
        message = "`response_format` and `structured_outputs` cannot be used together."
        raise RequestRejected(message, field="structured_outputs")
    if format is not None:
        return checked(_of_format(format), "response_format")
    return checked(_of_outputs(outputs), "structured_outputs") if outputs is not None else None


def _of_format(format: ResponseFormat) -> StructuredOutput:
    match format:
        case JsonSchemaFormat():
            return StructuredOutput("json", _json(format.json_schema.schema))
        case StructuralTagFormat():
            return StructuredOutput("structural_tag", _json(format))
        case _:
            return StructuredOutput("json_object")


def _of_outputs(outputs: StructuredOutputs) -> StructuredOutput:
    given = msgspec.structs.asdict(outputs)
    for option in _OPTIONS:
        if given.pop(option):
            raise unsupported(
                f"structured_outputs.{option}",
                instead="of vLLM's options only the worker's flag --structured-outputs-config counts",
            )
    kinds = [kind for kind, value in given.items() if value is not None and value is not False]
    if len(kinds) != 1:
        got = ", ".join(kinds) or "none"
        message = f"`structured_outputs` needs exactly one of {', '.join(given)}; got {got}."
        raise RequestRejected(message, field="structured_outputs")
    (kind,) = kinds
    value = given[kind]
    if kind == "json_object":
        return StructuredOutput("json_object")
    spec = value if isinstance(value, str) else _json(value)
    return msgspec.convert({"kind": kind, "spec": spec}, StructuredOutput)


def checked(output: StructuredOutput, field: str) -> StructuredOutput:
    """The same. Raises RequestRejected, naming this field, when it is too long or too deep."""
    if len(output.spec) > MAX_SPEC_CHARS:
        message = f"`{field}` has {len(output.spec)} characters, more than {MAX_SPEC_CHARS}."
        raise RequestRejected(message, field=field)
    if output.kind in ("json", "structural_tag"):
        try:
            check_depth(msgspec.json.decode(output.spec), field)
        except (msgspec.DecodeError, RecursionError) as error:  # given as a string
            raise RequestRejected(f"`{field}` is not valid JSON: {error}.", field=field) from None
    return output


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
