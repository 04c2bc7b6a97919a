"""Tools of a Responses request as functions of a chat, and calls of those as the items that they become.

A model calls functions only. A custom tool is shown to it as a function of one text, `input`. A function of
a namespace is shown under both names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Literal, NamedTuple

import msgspec

from penstock.errors import RequestRejected
from penstock.frontend.http.json_limits import check_depth
from penstock.frontend.responses_api.request_body import ResponsesRequest, ResponseTool, ResponseToolChoice
from penstock.frontend.tools import Function, NamedFunction, NamedTool, Tool
from penstock.frontend.unserved import unsupported
from penstock.shapes import JsonObject

INPUT: Final = "input"  # the one parameter of a custom tool

_INPUT_SCHEMA: Final[JsonObject] = {
    "type": "object",
    "properties": {INPUT: {"type": "string", "description": "The whole input of the tool, as plain text."}},
    "required": [INPUT],
    "additionalProperties": False,
}

ChatToolChoice = Literal["none", "auto", "required"] | NamedTool | None


class Offered(NamedTuple):
    """One tool, as the client knows it."""

    type: str  # function or custom
    name: str
    namespace: str | None = None


class OfferedTools(NamedTuple):
    """The tools of a request, in terms of a chat."""

    tools: list[Tool] | None
    choice: ChatToolChoice
    by_name: dict[str, Offered]  # by the name that the model is shown


def shown_name(name: str, namespace: str | None) -> str:
    """The name under which the model knows a tool."""
    return f"{namespace}__{name}" if namespace else name


def offered_tools(request: ResponsesRequest) -> OfferedTools:
    """Raises RequestRejected for tools that OpenAI runs itself, and for a choice that is not among them."""
    tools: dict[str, Tool] = {}
    by_name: dict[str, Offered] = {}
    for tool, offered, where in _each(request.tools or (), "tools", None):
        name = shown_name(offered.name, offered.namespace)
        if name in tools:
            raise RequestRejected(f"`{where}.name`: `{name}` is there twice.", field=f"{where}.name")
        tools[name], by_name[name] = Tool(_function(tool, name)), offered
    choice = request.tool_choice
    if isinstance(choice, ResponseToolChoice):
        if choice.type == "allowed_tools":
            allowed = {_chosen(tool, by_name, f"tool_choice.tools[{i}]") for i, tool in _allowed(choice)}
            tools = {name: tool for name, tool in tools.items() if name in allowed}
            return OfferedTools(list(tools.values()) or None, choice.mode or "auto", by_name)
        name = _chosen(choice, by_name, "tool_choice")
        return OfferedTools(list(tools.values()), NamedTool(NamedFunction(name)), by_name)
    if choice == "required" and not tools:
        raise RequestRejected("`tool_choice` needs `tools`.", field="tool_choice")
    return OfferedTools(list(tools.values()) or None, choice if tools else None, by_name)


def shown_tools(request: ResponsesRequest) -> list[JsonObject]:
    """As the response repeats them: clients want some fields even where they are null."""
    shown = []
    for tool in request.tools or ():
        fields: JsonObject = msgspec.to_builtins(tool)
        if tool.type == "function":
            fields = {"parameters": None, "strict": None, **fields}
        shown.append(fields)
    return shown


def _each(
    tools: Sequence[ResponseTool], where: str, namespace: str | None
) -> Iterator[tuple[ResponseTool, Offered, str]]:
    for index, tool in enumerate(tools):
        place = f"{where}[{index}]"
        if tool.type == "namespace" and namespace is None:
            yield from _each(tool.tools or (), f"{place}.tools", _named(tool, place))
        elif tool.type in ("function", "custom"):
            yield tool, Offered(tool.type, _named(tool, place), namespace), place
        elif tool.type != "web_search" or tool.external_web_access is not False:
            message = (
                f"`{place}.type`: tools of type `{tool.type[:80]}` are not served, as they run at OpenAI;"
                " only `function` and `custom` tools are, which the client runs."
            )
            raise RequestRejected(message, code="unsupported_value", field=f"{place}.type")


def _named(tool: ResponseTool, place: str) -> str:
    if tool.name is None:
        raise RequestRejected(
            f"Missing required field: `{place}.name`.", code="missing_field", field=f"{place}.name"
        )
    if tool.format is not None and tool.format.type not in ("", "text"):
        reason = "a grammar cannot be held to within a call; use `text`, and describe it in `description`"
        raise unsupported(f"{place}.format.type", " other than `text`", reason)
    check_depth(tool.parameters, f"{place}.parameters")
    return tool.name


def _function(tool: ResponseTool, name: str) -> Function:
    parameters = _INPUT_SCHEMA if tool.type == "custom" else tool.parameters
    return Function(name, tool.description, parameters, tool.strict)


def _allowed(choice: ResponseToolChoice) -> Iterator[tuple[int, ResponseToolChoice]]:
    if not choice.tools:
        message = "Missing required field: `tool_choice.tools`."
        raise RequestRejected(message, code="missing_field", field="tool_choice.tools")
    return iter(enumerate(choice.tools))


def _chosen(choice: ResponseToolChoice, by_name: dict[str, Offered], where: str) -> str:
    if choice.type not in ("function", "custom"):
        raise unsupported(f"{where}.type", f" `{choice.type[:80]}`")
    for name, offered in by_name.items():
        if choice.name in (name, offered.name) and choice.type == offered.type:
            return name
    message = f"`{where}.name`: no {choice.type} `{choice.name}` is among `tools`."
    raise RequestRejected(message, field=f"{where}.name")
