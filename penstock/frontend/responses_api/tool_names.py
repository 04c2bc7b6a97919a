"""Tools of a Responses request as functions of a chat, and calls of those as the items that they become.

A model calls functions only. A custom tool is shown to it as a function of one text, `input`. A function of
a namespace is shown under both names.

The input's format is held to wherever a function's schema is: when the client makes the model call a tool.
A regular expression is part of that schema. JSON's schemas have no word for a Lark grammar: it is shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import msgspec

from penstock.errors import RequestRejected
from penstock.frontend.http.json_limits import check_depth
from penstock.frontend.responses_api.request_body import (
    ResponsesRequest,
    ResponseTool,
    ResponseToolChoice,
    ToolFormat,
)
from penstock.frontend.tools import INPUT, Function, Tool, ToolChoice, selection_among, selection_of
from penstock.frontend.unserved import unsupported
from penstock.shapes import JsonObject


class Offered(NamedTuple):
    """One tool, as the client knows it."""

    type: str  # function or custom
    name: str
    namespace: str | None = None


class OfferedTools(NamedTuple):
    """The tools of a request, in terms of a chat."""

    tools: list[Tool] | None
    choice: ToolChoice
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
        tools[name], by_name[name] = Tool(_function(tool, name, where)), offered
    choice = request.tool_choice
    if isinstance(choice, ResponseToolChoice):
        if choice.type == "allowed_tools":
            chosen = [_chosen(tool, by_name, f"tool_choice.tools[{i}]") for i, tool in _allowed(choice)]
            selection = selection_among(chain.from_iterable(chosen), choice.mode or "auto")
        else:
            selection = selection_of(_chosen(choice, by_name, "tool_choice")[0])
        return OfferedTools(list(tools.values()), selection, by_name)
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
        if tool.input_schema is not None:
            raise unsupported(f"{place}.input_schema", instead="use `parameters`")
        if tool.type == "namespace" and namespace is None:
            yield from _each(tool.tools or (), f"{place}.tools", _named(tool, place))
        elif tool.type in ("function", "custom"):
            yield tool, Offered(tool.type, _named(tool, place), namespace), place
        elif not tool.type:
            field = f"{place}.type"
            raise RequestRejected(f"Missing required field: `{field}`.", code="missing_field", field=field)
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
    check_depth(tool.parameters, f"{place}.parameters")
    return tool.name


def _function(tool: ResponseTool, name: str, place: str) -> Function:
    parameters, strict = tool.parameters, tool.strict
    if tool.type == "custom":
        text = _input_schema(tool.format or ToolFormat(), f"{place}.format")
        strict = True if "pattern" in text else None  # vLLM holds arguments to their schema only if told so
        parameters = {
            "type": "object",
            "properties": {INPUT: text},
            "required": [INPUT],
            "additionalProperties": False,
        }
    return Function(name, tool.description, parameters, strict)


def _input_schema(format: ToolFormat, place: str) -> JsonObject:
    """Of the one text that a custom tool takes."""
    text: JsonObject = {"type": "string", "description": "The whole input of the tool, as plain text."}
    if format.type in ("", "text"):
        return text
    if format.type != "grammar":
        raise unsupported(f"{place}.type", " other than `text` and `grammar`")
    if format.definition is None:
        where = f"{place}.definition"
        raise RequestRejected(f"Missing required field: `{where}`.", code="missing_field", field=where)
    if format.syntax == "regex":
        return {**text, "pattern": f"^(?:{format.definition})$"}
    if format.syntax != "lark":
        raise RequestRejected(f"`{place}.syntax` must be `lark` or `regex`.", field=f"{place}.syntax")
    return {
        **text,
        "description": f"{text['description']} It follows this Lark grammar:\n{format.definition}",
    }


def _allowed(choice: ResponseToolChoice) -> Iterator[tuple[int, ResponseToolChoice]]:
    if not choice.tools:
        message = "Missing required field: `tool_choice.tools`."
        raise RequestRejected(message, code="missing_field", field="tool_choice.tools")
    return iter(enumerate(choice.tools))


def _chosen(choice: ResponseToolChoice, by_name: dict[str, Offered], where: str) -> list[str]:
    """The names, as the model is shown them, of what a choice names: of one tool, or of those with that
    name in different namespaces. Raises RequestRejected where there is none."""
    if choice.type not in ("function", "custom"):
        raise unsupported(f"{where}.type", f" `{choice.type[:80]}`")
    if choice.name is None:
        field = f"{where}.name"
        raise RequestRejected(f"Missing required field: `{field}`.", code="missing_field", field=field)
    names = [
        name
        for name, offered in by_name.items()
        if choice.name in (name, offered.name) and choice.type == offered.type
    ]
    if names:
        return [choice.name] if choice.name in names else names
    message = f"`{where}.name`: no {choice.type} `{choice.name}` is among `tools`."
    raise RequestRejected(message, field=f"{where}.name")
