"""What an answer must look like: OpenAI's `response_format`, and `structured_outputs`, vLLM's own field."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from penstock.errors import RequestRejected
from penstock.frontend.http.json_limits import check_depth
from penstock.frontend.schemas import is_well_formed, loosened, type_alone, without_empty_words
from penstock.shapes import JsonObject, StructuredOutput

MAX_SPEC_CHARS: Final = 256 * 1024
"""Of a schema, grammar or list of choices: an engine compiles it before the first token."""

MAX_PATTERN_CHARS: Final = 512

Text = Annotated[str, Meta(min_length=1)]


class TextFormat(msgspec.Struct, tag_field="type", tag="text"):
    """Anything."""


class JsonObjectFormat(msgspec.Struct, tag_field="type", tag="json_object", omit_defaults=True):
    """Some JSON object; or one of this schema, as llama.cpp, Together and Fireworks have it."""

    schema: JsonObject | None = None


class NamedSchema(msgspec.Struct):
    name: Text
    schema: JsonObject
    description: str | None = None
    strict: bool | None = None

    def __post_init__(self) -> None:
        self.schema = without_empty_words(self.schema) if self.strict else loosened(self.schema)

    @property
    def hint(self) -> JsonObject | None:
        """What to hold an answer to where an engine cannot compile the schema; None where it must."""
        return None if self.strict or not is_well_formed(self.schema) else type_alone(self.schema)


class JsonSchemaFormat(msgspec.Struct, tag_field="type", tag="json_schema"):
    """JSON of this schema."""

    json_schema: NamedSchema


class StructuralTagFormat(msgspec.Struct, tag_field="type", tag="structural_tag", omit_defaults=True):
    """Text in which some places have a form; in either of the two shapes that xgrammar takes."""

    format: Any = None
    structures: list[JsonObject] | None = None
    triggers: list[str] | None = None


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat | StructuralTagFormat


def as_openai_has_it(format: ResponseFormat | None) -> ResponseFormat | None:
    """The same format in a shape that engines' parsers know, too."""
    if isinstance(format, JsonObjectFormat) and format.schema is not None:
        return JsonSchemaFormat(NamedSchema("object", format.schema))
    return format


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Exactly one of these."""

    json: str | JsonObject | None = None  # a JSON schema
    regex: Text | None = None
    choice: Annotated[list[Text], Meta(min_length=1)] | None = None
    grammar: Text | None = None
    json_object: bool | None = None
    structural_tag: Text | None = None

    # Options of `json` and `json_object`.
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: Annotated[str, Meta(min_length=1, max_length=MAX_PATTERN_CHARS)] | None = None

    def __post_init__(self) -> None:
        if self.disable_additional_properties and self.json is not None:
            with contextlib.suppress(msgspec.DecodeError, RecursionError):  # `checked` tells of it
                schema = msgspec.json.decode(self.json) if isinstance(self.json, str) else self.json
                self.json = closed(schema)
        if isinstance(self.json, dict):
            self.json = without_empty_words(self.json)


_OPTIONS: Final = ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")
_JSON_KINDS: Final = ("json", "json_object")


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


def hinted(format: ResponseFormat | None) -> StructuredOutput | None:
    """What to hold an answer to where no engine can compile the format's schema; None where it must."""
    hint = format.json_schema.hint if isinstance(format, JsonSchemaFormat) else None
    return None if hint is None else StructuredOutput("json", _json(hint))


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
    options = [option for option in _OPTIONS if given.pop(option)]
    kinds = [kind for kind, value in given.items() if value is not None and value is not False]
    if len(kinds) != 1:
        got = ", ".join(kinds) or "none"
        message = f"`structured_outputs` needs exactly one of {', '.join(given)}; got {got}."
        raise RequestRejected(message, field="structured_outputs")
    (kind,) = kinds
    if options and kind not in _JSON_KINDS:
        field = f"structured_outputs.{options[0]}"
        raise RequestRejected(f"`{field}` needs `json` or `json_object`.", field=field)
    spec = given[kind] if kind != "json_object" else ""
    wanted = {
        "kind": kind,
        "spec": spec if isinstance(spec, str) else _json(spec),
        "disable_any_whitespace": bool(outputs.disable_any_whitespace),
        "whitespace_pattern": outputs.whitespace_pattern or "",
    }
    return msgspec.convert(wanted, StructuredOutput)


def closed(schema: Any) -> Any:
    """The schema, changed so that objects have no properties that it does not name, unless it says itself
    which others they may have. (vLLM's rule.)"""
    left = [schema]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            left += part.values()
            if "properties" in part or "patternProperties" in part:
                part.setdefault("additionalProperties", False)
        elif isinstance(part, list):
            left += part
    return schema


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
