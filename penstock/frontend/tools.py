"""Tools that a chat's model may call, as OpenAI's API describes them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from penstock.errors import RequestRejected
from penstock.frontend.http.json_limits import check_depth
from penstock.shapes import JsonObject

MAX_TOOLS: Final = 1024
MAX_NAME_CHARS: Final = 256
INPUT: Final = "input"  # the one parameter of a custom tool, which models are shown as a function

FunctionName = Annotated[str, Meta(min_length=1, max_length=MAX_NAME_CHARS)]


class Function(msgspec.Struct):
    """What a tool does. `parameters` is a JSON schema."""

    name: FunctionName
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None
    defer_loading: bool | None = None


class Tool(msgspec.Struct):
    """Functions are the only kind."""

    function: Function
    type: Literal["function"] | None = "function"
    defer_loading: bool | None = None

    def __post_init__(self) -> None:
        self.type = "function"  # also where it was null


class NamedFunction(msgspec.Struct):
    name: FunctionName


class NamedTool(msgspec.Struct):
    """One of the tools, by its name."""

    function: NamedFunction
    type: Literal["function"] | None = "function"

    def __post_init__(self) -> None:
        self.type = "function"


class AllowedTools(msgspec.Struct):
    """Some of the tools, of which the model may call any, or must call one."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Meta(min_length=1, max_length=MAX_TOOLS)]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.function.name for tool in self.tools)


class ToolSelection(msgspec.Struct, omit_defaults=True):
    """A choice of one tool, which the model must call, or of several."""

    type: Literal["function", "allowed_tools"] | None = None
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None

    def __post_init__(self) -> None:
        self.type = self.type or "function"
        if self.type == "function":
            self.allowed_tools = None


ToolChoice = Literal["none", "auto", "required"] | ToolSelection | None


def selection_of(name: str) -> ToolSelection:
    """The choice of this tool."""
    return ToolSelection("function", NamedFunction(name))


def selection_among(names: Iterable[str], mode: Literal["auto", "required"]) -> ToolSelection:
    """The choice of these tools."""
    tools = [NamedTool(NamedFunction(name)) for name in names]
    return ToolSelection("allowed_tools", allowed_tools=AllowedTools(mode, tools))


def check_tools(tools: Sequence[Tool] | None, choice: ToolChoice) -> None:
    """Raises RequestRejected for a choice that these tools do not offer, or too deep a schema."""
    for index, tool in enumerate(tools or ()):
        check_depth(tool.function.parameters, f"tools[{index}].function.parameters")
    if choice is None or choice == "none":
        return
    if not tools:
        raise RequestRejected("`tool_choice` needs `tools`.", field="tool_choice")
    if isinstance(choice, ToolSelection):
        _check_selection(choice, {tool.function.name for tool in tools})


def _check_selection(choice: ToolSelection, names: Collection[str]) -> None:
    if choice.type == "allowed_tools" and choice.allowed_tools is not None:
        places = [
            (f"allowed_tools.tools[{index}].function.name", tool.function.name)
            for index, tool in enumerate(choice.allowed_tools.tools)
        ]
    elif choice.type == "function" and choice.function is not None:
        places = [("function.name", choice.function.name)]
    else:
        field = f"tool_choice.{choice.type}"
        raise RequestRejected(f"Missing required field: `{field}`.", code="missing_field", field=field)
    for place, name in places:
        if name not in names:
            message = f"`tool_choice` names `{name}`, which is not among `tools`."
            raise RequestRejected(message, field=f"tool_choice.{place}")


def template_tools(tools: Sequence[Tool] | None) -> list[JsonObject] | None:
    """As templates get them: with every field but `strict` and `defer_loading` even when it is null, as
    vLLM gives them, since templates write them out whole."""
    return [_template_tool(tool) for tool in tools] if tools else None


def _template_tool(tool: Tool) -> JsonObject:
    function = msgspec.structs.asdict(tool.function)
    if tool.function.strict is None:
        del function["strict"]
    if tool.function.defer_loading is None:
        del function["defer_loading"]
    shown: JsonObject = {"type": "function", "function": function}
    if tool.defer_loading is not None:
        shown["defer_loading"] = tool.defer_loading
        function.setdefault("defer_loading", tool.defer_loading)
    return shown
