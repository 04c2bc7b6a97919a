"""Items of a conversation, as messages of a chat.

As for chats, nothing that a model may have written refuses a conversation (frontend/messages.py).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Final

from penstock.errors import RequestRejected
from penstock.frontend.messages import (
    ContentPart,
    FunctionCall,
    Message,
    ToolCall,
    as_arguments,
    joined_text,
)
from penstock.frontend.responses_api.request_body import InputItem
from penstock.frontend.responses_api.tool_names import shown_name
from penstock.frontend.tools import INPUT

_CARRIED: Final = "penstock:"  # before reasoning in `encrypted_content`

PlacedItem = tuple[InputItem, str]
"""An item, and its path."""

MESSAGE: Final = "message"
REFERENCE: Final = "item_reference"


def kind_of_item(item: InputItem) -> str:
    """Its type, which may be left out of messages and references."""
    if item.type is not None:
        return item.type
    return REFERENCE if item.role is None and item.id is not None else MESSAGE


def carried(reasoning: str) -> str:
    """Reasoning as a client keeps it that sends back only `encrypted_content`. The client has the text
    anyway, so it is not encrypted."""
    return _CARRIED + base64.b64encode(reasoning.encode()).decode()


def messages_of(items: Sequence[PlacedItem]) -> list[Message]:
    """Raises RequestRejected for what is no text."""
    conversation = _Conversation()
    for item, where in items:
        conversation.add(item, where)
    return conversation.messages


class _Conversation:
    """Reasoning, text and calls that follow each other are one message of the assistant, as templates
    want them."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def add(self, item: InputItem, where: str) -> None:
        match kind_of_item(item):
            case "message":
                self._message(item, where)
            case "reasoning":
                self._reasoning(item)
            case "function_call":
                self._call(item, item.arguments, where)
            case "custom_tool_call":
                self._call(item, {INPUT: "" if item.input is None else item.input}, where)
            case "function_call_output" | "custom_tool_call_output":
                output = _text(item.output, f"{where}.output")
                if output is None:
                    raise _missing(f"{where}.output")
                self.messages.append(Message("tool", output, tool_call_id=item.call_id))
            case other:
                field = f"{where}.type"
                message = f"`{field}`: items of type `{other[:80]}` are not served."
                raise RequestRejected(message, code="unsupported_value", field=field)

    def _message(self, item: InputItem, where: str) -> None:
        if item.role is None:
            raise _missing(f"{where}.role")
        text = _text(item.content, f"{where}.content")
        if item.role != "assistant":
            if text is None:
                raise _missing(f"{where}.content")
            self.messages.append(Message(item.role, text))
            return
        message = self._turn(may_call=False)
        message.content = text or ""

    def _reasoning(self, item: InputItem) -> None:
        parts = item.content or item.summary or ()
        given = [parts] if isinstance(parts, str) else [_part_text(part) for part in parts]
        texts = [text for text in given if isinstance(text, str)]
        text = "\n".join(texts) or _carried_text(item.encrypted_content)
        if not text:
            return
        message = self._turn(may_call=False)
        message.reasoning = text if message.reasoning is None else f"{message.reasoning}\n{text}"

    def _call(self, item: InputItem, arguments: object, where: str) -> None:
        name = shown_name(item.name or "", item.namespace)
        given = as_arguments(arguments, name, f"{where}.arguments")
        message = self._turn(may_call=True)
        call = ToolCall(FunctionCall(name, given), item.call_id)
        message.tool_calls = [*(message.tool_calls or ()), call]

    def _turn(self, *, may_call: bool) -> Message:
        """The assistant's message that goes on, or a new one."""
        last = self.messages[-1] if self.messages else None
        if last is None or last.role != "assistant" or (not may_call and not _only_reasons(last)):
            last = Message("assistant")
            self.messages.append(last)
        return last


def _only_reasons(message: Message) -> bool:
    return message.content is None and not message.tool_calls


def _part_text(part: ContentPart | str) -> object:
    return part if isinstance(part, str) else part.text


def _text(content: object, where: str) -> str | None:
    return joined_text(content, where) if isinstance(content, list) else content  # type: ignore[return-value]


def _carried_text(encrypted: str | None) -> str:
    """What `carried` made; empty for what others encrypted."""
    if encrypted is None or not encrypted.startswith(_CARRIED):
        return ""
    try:
        return base64.b64decode(encrypted.removeprefix(_CARRIED), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""


def _missing(field: str) -> RequestRejected:
    return RequestRejected(f"Missing required field: `{field}`.", code="missing_field", field=field)
