"""Tools in the shape of another API than the one that was asked: each API has its own.

An error about a tool, or about `tool_choice`, says which shape was expected, and which was sent."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from typing import Any, Final

import msgspec

from penstock.errors import RequestRejected


class ToolShape(Enum):
    """Whose shape a tool has: the path of an API."""

    CHAT = "/v1/chat/completions"
    RESPONSES = "/v1/responses"
    MESSAGES = "/v1/messages"


_TOOLS: Final = {
    ToolShape.CHAT: '{"type": "function", "function": {"name": ..., "parameters": ...}}',
    ToolShape.RESPONSES: '{"type": "function", "name": ..., "parameters": ...}',
    ToolShape.MESSAGES: '{"name": ..., "input_schema": ...}',
}
_CHOICES: Final = {
    ToolShape.CHAT: '"none", "auto", "required", {"type": "function", "function": {"name": ...}} or'
    ' {"type": "allowed_tools", "allowed_tools": {"mode": ..., "tools": [...]}}',
    ToolShape.RESPONSES: '"none", "auto", "required", {"type": "function", "name": ...} or'
    ' {"type": "allowed_tools", "mode": ..., "tools": [...]}',
    ToolShape.MESSAGES: '{"type": "none"}, {"type": "auto"}, {"type": "any"} or'
    ' {"type": "tool", "name": ...}',
}
_FIELD: Final = re.compile(r"(?:tools\[(\d+)\]|tool_choice)(?:\.|$)")


class _Tools(msgspec.Struct):
    tools: Any = None
    tool_choice: Any = None


@contextmanager
def naming_tool_shapes(body: bytes, own: ToolShape) -> Iterator[None]:
    """Errors that are raised within say more where they are about a tool of another API's shape."""
    try:
        yield
    except RequestRejected as error:
        error.message += _explanation(body, error.field or "", own)
        error.args = (error.message,)
        raise


def _explanation(body: bytes, field: str, own: ToolShape) -> str:
    match = _FIELD.match(field)
    if match is None:
        return ""
    with suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError, LookupError, TypeError):
        given = msgspec.json.decode(body, type=_Tools)
        if match[1] is None:
            sent = _shape_of_choice(given.tool_choice, own)
            expected = f"`tool_choice` of {own.value} is {_CHOICES[own]}"
        else:
            tool = given.tools[int(match[1])]
            sent = _shape_of_tool(tool)
            expected = f"A tool of {own.value} is {_TOOLS[own]}"
            if sent is None and own is ToolShape.CHAT and isinstance(tool, dict) and "custom" in tool:
                expected += f"; {ToolShape.RESPONSES.value} has custom tools"
        if sent is not own:
            return f" {expected}." if sent is None else f" {expected}; this is that of {sent.value}."
    return ""


def _shape_of_tool(tool: Any) -> ToolShape | None:
    if not isinstance(tool, dict):
        return None
    if isinstance(tool.get("function"), dict):
        return ToolShape.CHAT
    if "input_schema" in tool:
        return ToolShape.MESSAGES
    return ToolShape.RESPONSES if tool.get("type") == "function" and "name" in tool else None


def _shape_of_choice(choice: Any, own: ToolShape) -> ToolShape | None:
    if isinstance(choice, str):
        is_openais = choice in ("none", "auto", "required")
        return ToolShape.CHAT if is_openais and own is ToolShape.MESSAGES else None
    if not isinstance(choice, dict):
        return None
    if isinstance(choice.get("function") or choice.get("allowed_tools"), dict):
        return ToolShape.CHAT
    if choice.get("type") == "allowed_tools":
        return ToolShape.RESPONSES
    if choice.get("type") in ("none", "auto", "any", "tool"):
        return ToolShape.MESSAGES
    return ToolShape.RESPONSES if choice.get("type") == "function" and "name" in choice else None
