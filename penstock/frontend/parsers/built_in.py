"""Parsers of the most common formats of reasoning and tool calls, for frontends without vLLM.

They have the names that vLLM gives them, and take answers apart as vLLM's do.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from penstock.errors import ConfigError
from penstock.frontend.parsers.calls import CallFormat, CallScanner, new_call_id, overlap
from penstock.frontend.reply import joined
from penstock.frontend.schemas import loosened
from penstock.frontend.structured import ResponseFormat, StructuredOutputs, constraint
from penstock.shapes import Answering, JsonObject, ModelView, Parsed, StructuredOutput, ToolCallDelta

HERMES: Final = CallFormat("<tool_call>", "</tool_call>")
LLAMA: Final = CallFormat("", separators="; \t\r\n")
MISTRAL: Final = CallFormat("[TOOL_CALLS]", separators="[], \t\r\n")
FORCED: Final = CallFormat("", separators="[], \t\r\n")  # the list that `tool_choice: required` asks for

TOOL_FORMATS: Final[dict[str, CallFormat]] = {
    "hermes": HERMES,
    "llama3_json": LLAMA,
    "llama4_json": LLAMA,
    "mistral": MISTRAL,
}
"""By the name of vLLM's parser."""

_THINK: Final = ("<think>", "</think>")
REASONING_MARKS: Final[dict[str, tuple[str, str]]] = {"qwen3": _THINK, "deepseek_r1": _THINK}
"""By the name of vLLM's parser: what begins and what ends a model's reasoning."""

ANY_ARGUMENTS: Final[JsonObject] = {"type": "object"}
NO_ARGUMENTS: Final[JsonObject] = {"type": "object", "properties": {}}  # engines allow no others

_REFERENCE: Final = '"$ref": "#'  # how `json.dumps` writes a reference within the same schema


class BuiltInParsers:
    """A ChatParsers."""

    def has(self, answering: Answering) -> bool:
        """As ChatParsers.has."""
        tools = answering.tool_parser in ("", *TOOL_FORMATS)
        return tools and answering.reasoning_parser in ("", *REASONING_MARKS)

    def load(self, model: ModelView) -> BuiltInChatParser:
        """As ChatParsers.load."""
        answering = model.card.answering
        for name, known in (
            (answering.tool_parser, TOOL_FORMATS),
            (answering.reasoning_parser, REASONING_MARKS),
        ):
            if name and name not in known:
                raise ConfigError(f"there is no built-in parser {name}; there are {', '.join(known)}")
        _, reasoning_end = REASONING_MARKS.get(answering.reasoning_parser, ("", ""))
        end_id = None
        if reasoning_end:
            end_id = _token_id(model, reasoning_end)
            if end_id is None:
                message = f"parser {answering.reasoning_parser}: the tokenizer has no token {reasoning_end}"
                raise ConfigError(message)
        return BuiltInChatParser(TOOL_FORMATS.get(answering.tool_parser), reasoning_end, end_id)


def _token_id(model: ModelView, token: str) -> int | None:
    tokenizer: JsonObject = json.loads(model.assets["tokenizer.json"])
    added: Iterable[JsonObject] = tokenizer.get("added_tokens") or ()
    return next((int(it["id"]) for it in added if it["content"] == token), None)


@dataclass(frozen=True, slots=True)
class BuiltInChatParser:
    """A ChatParser."""

    format: CallFormat | None
    reasoning_end: str  # empty: the model does not reason
    reasoning_end_id: int | None

    def begin(self, body: JsonObject) -> BuiltInCallParser:
        """As ChatParser.begin."""
        return BuiltInCallParser(self, body)


class BuiltInCallParser:
    """A CallParser."""

    def __init__(self, model: BuiltInChatParser, body: JsonObject) -> None:
        self.model = model
        self.tools: dict[str, JsonObject] = {}  # parameters by name; empty: no calls are looked for
        self.named = ""  # the tool that the client has chosen
        self.required = False
        self.parallel = body.get("parallel_tool_calls") is not False
        self.shows_reasoning = body.get("include_reasoning") is not False
        variables = body.get("chat_template_kwargs") or {}
        thinks = variables.get("enable_thinking", body.get("reasoning_effort") != "none")
        self.reasons = bool(model.reasoning_end) and thinks is not False
        self._given = constraint(
            msgspec.convert(body.get("response_format"), ResponseFormat | None),
            msgspec.convert(body.get("structured_outputs"), StructuredOutputs | None),
        )
        choice = body.get("tool_choice")
        if model.format is not None and choice != "none":
            functions = [tool["function"] for tool in body.get("tools") or ()]
            self.tools = {it["name"]: _arguments(it) for it in functions}
            self.required = choice == "required"
            self.named = choice["function"]["name"] if isinstance(choice, dict) else ""
        self.skip_special_tokens = not self.tools and body.get("skip_special_tokens") is not False

    def structured(self, prompt_ids: Sequence[int]) -> StructuredOutput | None:
        """As CallParser.structured."""
        wanted = self._given
        if self.named or self.required:
            schema = self.tools[self.named] if self.named else self._list_of_calls()
            wanted = StructuredOutput("json", json.dumps(schema, ensure_ascii=False))
        if wanted is None:
            return None
        return msgspec.structs.replace(wanted, reasoning_ended=not self.reasons)

    def _list_of_calls(self) -> JsonObject:
        calls: list[JsonObject] = []
        definitions: dict[str, JsonObject] = {}  # engines resolve references only from the root of a schema
        for number, (name, parameters) in enumerate(self.tools.items()):
            given = parameters
            text = json.dumps(parameters)
            if _REFERENCE in text:
                root = f"#/$defs/{number}"
                definitions[str(number)] = json.loads(text.replace(_REFERENCE, _REFERENCE[:-1] + root))
                definitions[str(number)].pop("$id", None)  # which references would be relative to
                given = {"$ref": root}
            calls.append(
                {
                    "type": "object",
                    "properties": {"name": {"enum": [name]}, "parameters": given},
                    "required": ["name", "parameters"],
                    "additionalProperties": False,
                }
            )
        schema: JsonObject = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
        if definitions:
            schema["$defs"] = definitions
        return schema if self.parallel else {**schema, "maxItems": 1}

    def answer(self, prompt_ids: Sequence[int]) -> BuiltInAnswerParser:
        """As CallParser.answer."""
        return BuiltInAnswerParser(self)


def _arguments(function: JsonObject) -> JsonObject:
    """The schema of a tool's arguments, as far as they are held to it. They are an object, also where their
    schema does not say so, or says something else. A tool without `parameters` has none, as at OpenAI."""
    schema = function.get("parameters") or NO_ARGUMENTS
    if not function.get("strict"):
        schema = loosened(schema)
    return {**schema, "type": "object"} if "object" in schema.get("type", "object") else ANY_ARGUMENTS


class BuiltInAnswerParser:
    """An AnswerParser."""

    def __init__(self, call: BuiltInCallParser) -> None:
        self._call = call
        self._reasoning = call.reasons  # whether the text still is reasoning
        self._held = ""  # of the reasoning: what may be the beginning of its end
        self._scanner: CallScanner | None = None
        format = FORCED if call.required else call.model.format
        if call.tools and format is not None:
            self._scanner = CallScanner(format, most_calls=None if call.parallel else 1)
        self._begun = False  # the call of the tool that the client has named

    def push(self, text: str, token_ids: Sequence[int], *, finished: bool) -> Parsed | None:
        """As AnswerParser.push."""
        parsed = Parsed(tool_calls=[])
        if self._reasoning:
            reasoning, text = self._read_reasoning(text, finished=finished)
            if self._call.shows_reasoning:
                parsed.reasoning = reasoning or None
        if self._scanner is None:
            parsed.content = text or None
        elif self._call.named:
            parsed.tool_calls += self._named_call(text)
        else:
            _add(parsed, self._scanner.push(text))
            if finished:
                _add(parsed, self._scanner.end())
        return parsed if parsed.content or parsed.reasoning or parsed.tool_calls else None

    def whole(self, text: str, token_ids: Sequence[int]) -> Parsed:
        """As AnswerParser.whole."""
        return joined([self.push(text, token_ids, finished=True) or Parsed()])

    def reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """As AnswerParser.reasoning_tokens."""
        if not self._call.reasons:
            return 0
        ids, end_id = list(token_ids), self._call.model.reasoning_end_id
        return ids.index(end_id) if end_id in ids else len(ids)

    def _named_call(self, text: str) -> list[ToolCallDelta]:
        """All of the text is the arguments of the tool that the client has named."""
        if not text:
            return []
        if self._begun:
            return [ToolCallDelta(0, arguments=text)]
        self._begun = True
        return [ToolCallDelta(0, new_call_id(), self._call.named, text)]

    def _read_reasoning(self, text: str, *, finished: bool) -> tuple[str, str]:
        """The reasoning in what is new, and the text behind its end."""
        mark = self._call.model.reasoning_end
        text = self._held + text
        reasoning, end, rest = text.partition(mark)
        if end:
            self._reasoning, self._held = False, ""
            return reasoning, rest
        kept = 0 if finished else overlap(text, mark)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept], ""


def _add(parsed: Parsed, more: Parsed) -> None:
    if more.content:
        parsed.content = (parsed.content or "") + more.content
    parsed.tool_calls += more.tool_calls
