"""A chat's messages: what clients may send, and what of it the chat template is shown.

Agents send back what a model wrote. So nothing that a model may have written refuses a conversation: tool
calls that were cut in the middle, refusals, empty texts. What is shown in place of it is what vLLM 0.32
shows (renderers/chat_utils.py there).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Final, Literal

import msgspec
from msgspec import UNSET, UnsetType

from penstock.errors import RequestRejected
from penstock.frontend.http.json_limits import check_depth
from penstock.frontend.tools import INPUT
from penstock.logs.quiet_log import QuietLog
from penstock.shapes import JsonObject

log = logging.getLogger("penstock.frontend")
_quiet_log = QuietLog(log)

TEXT_PARTS: Final = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
"""Types of content parts that are text, each with the field that holds it."""

_BILLING: Final = "x-anthropic-billing-header:"
_INSTRUCTING: Final = ("system", "developer")

_MAY_BE_EMPTY = ("assistant", "tool", "function")  # roles whose content may be null or left out


class ContentPart(msgspec.Struct):
    """One part of a message's content. Only text can be served."""

    type: str
    text: str | UnsetType | None = UNSET
    refusal: str | UnsetType | None = UNSET
    thinking: str | UnsetType | None = UNSET


class FunctionCall(msgspec.Struct):
    """`arguments` is whatever the model wrote; `settle` makes an object of it."""

    name: str
    arguments: Any = None


class CustomCall(msgspec.Struct):
    """A call of a tool that takes a text."""

    name: str
    input: Any = None


class ToolCall(msgspec.Struct):
    """A call that an assistant made in an earlier turn. `settle` makes one of a function of a custom
    tool's, with the text as its one argument, as models are shown custom tools in /v1/responses."""

    function: FunctionCall | None = None
    id: str | None = None
    type: Literal["function", "custom"] | None = None
    custom: CustomCall | None = None

    @property
    def called(self) -> FunctionCall:
        """Once it is settled."""
        assert self.function is not None
        return self.function


class Message(msgspec.Struct):
    """Once it is settled, `content` is a text (or None), and the arguments of tool calls are objects."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart | str] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None  # its older name
    refusal: str | None = None
    function_call: FunctionCall | None = None  # the older form of `tool_calls`
    tools: list[JsonObject] | None = None  # some templates let a developer's message bring tools
    task: str | None = None  # handed to the template, as in vLLM
    audio: Any = None


_NOTHING: Final = (None,) * 4


def settle(messages: Sequence[Message]) -> None:
    """Bring messages into one form, in place. Raises RequestRejected for what is no text."""
    for index, message in enumerate(messages):
        rest = message.tool_calls, message.function_call, message.tools, message.audio
        if type(message.content) is not str or rest != _NOTHING:
            _settle(message, f"messages[{index}]")
        if message.role in _INSTRUCTING and isinstance(message.content, str):
            message.content = without_billing_line(message.content)


def without_billing_line(text: str) -> str:
    """A system text without the line that Claude Code puts before it, such as
    `x-anthropic-billing-header: cc_version=2.1.177.01c; cc_entrypoint=cli; cch=36ee5;`. Anthropic's servers
    take it out for their accounts; it tells a model nothing. Its `cch` differs with each request, so that
    of two equal prompts not even the first block would be found in a cache."""
    return text.partition("\n")[2] if text.startswith(_BILLING) else text


def _settle(message: Message, where: str) -> None:
    if isinstance(message.content, list):
        message.content = joined_text(message.content, f"{where}.content")
    if message.content is None:
        message.content = message.refusal
    if message.content is None and message.role not in _MAY_BE_EMPTY:
        field = f"{where}.content"
        raise RequestRejected(f"`{field}` must be a string or a list of text parts.", field=field)
    if message.audio is not None:
        raise _no_text(f"{where}.audio", "audio")
    if message.function_call is not None and not message.tool_calls:
        message.tool_calls = [ToolCall(message.function_call)]
    if message.tools is not None:
        check_depth(message.tools, f"{where}.tools")
    for number, call in enumerate(message.tool_calls or ()):
        _settle_call(call, f"{where}.tool_calls[{number}]")


def _settle_call(call: ToolCall, where: str) -> None:
    if call.custom is not None and call.function is None:
        text = "" if call.custom.input is None else call.custom.input
        call.function = FunctionCall(call.custom.name, {INPUT: text})
        call.type, call.custom = "function", None
    if call.function is None:
        field = f"{where}.{call.type or 'function'}"
        raise RequestRejected(f"Missing required field: `{field}`.", code="missing_field", field=field)
    function = call.function
    function.arguments = as_arguments(function.arguments, function.name, f"{where}.function.arguments")


def joined_text(parts: Sequence[ContentPart | str], where: str) -> str:
    """Text parts as one string: every template takes that, not every one takes a list."""
    texts = []
    for number, part in enumerate(parts):
        text = part if isinstance(part, str) else _text_of(part, f"{where}[{number}]")
        if text is not None:
            texts.append(text)
    return "\n".join(texts)


def _text_of(part: ContentPart, where: str) -> str | None:
    name = TEXT_PARTS.get(part.type)
    if name is None:
        raise _no_text(f"{where}.type", part.type[:40])
    text: str | UnsetType | None = getattr(part, name)
    if text is UNSET:
        field = f"{where}.{name}"
        raise RequestRejected(f"Missing required field: `{field}`.", code="missing_field", field=field)
    return text


def _no_text(field: str, kind: str) -> RequestRejected:
    message = (
        f"`{field}`: parts of type `{kind}` are not served: no images, audio or files,"
        f" only text ({', '.join(f'`{name}`' for name in TEXT_PARTS)})."
    )
    return RequestRejected(message, field=field)


def as_arguments(given: Any, name: str, where: str) -> JsonObject:
    """What a model gave to the tool of this name, as an object, which templates want: they write the JSON
    themselves. `where` is the field's path, for the log."""
    if given is None or given == "":
        return {}
    try:
        arguments = msgspec.json.decode(given) if isinstance(given, str) else given
        if isinstance(arguments, dict):
            check_depth(arguments, "arguments")
            return arguments
        reason = "no JSON object"
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        reason = "no JSON"
    except RequestRejected:
        reason = "nested too deeply"
    _quiet_log.warning(
        "%s of %r: %s; it counts as {}",
        where,
        name[:80],
        reason,
    )
    return {}


def template_messages(messages: Sequence[Message]) -> list[JsonObject]:
    """Settled messages as templates are shown them; the objects are the caller's own."""
    return [_template_message(message) for message in messages]


def _template_message(message: Message) -> JsonObject:
    shown: JsonObject = {"role": message.role, "content": message.content or ""}
    for name in ("name", "tool_call_id", "task"):
        value = getattr(message, name)
        if value is not None:
            shown[name] = value
    reasoning = message.reasoning if message.reasoning is not None else message.reasoning_content
    if reasoning is not None:  # templates know either name
        shown["reasoning"] = shown["reasoning_content"] = reasoning
    if message.role == "developer":
        shown["tools"] = message.tools
    if message.tool_calls:
        shown["tool_calls"] = [
            {"id": call.id or "", "type": "function", "function": msgspec.structs.asdict(call.called)}
            for call in message.tool_calls
        ]
    return shown


def openai_messages(messages: Sequence[Message]) -> list[JsonObject]:
    """Settled messages in OpenAI's own shape, without what is not set: arguments are JSON texts."""
    return [_openai_message(message) for message in messages]


def _openai_message(message: Message) -> JsonObject:
    set_fields = {name: value for name, value in msgspec.to_builtins(message).items() if value is not None}
    set_fields.pop("function_call", None)  # it is among the tool calls
    if message.tool_calls is not None:
        set_fields["tool_calls"] = [
            {
                "id": call.id or "",
                "type": "function",
                "function": {
                    "name": call.called.name,
                    "arguments": msgspec.json.encode(call.called.arguments).decode(),
                },
            }
            for call in message.tool_calls
        ]
    return set_fields
