"""Tools that a chat's model may call, as OpenAI's API describes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from penstock.errors import RequestRejected
from penstock.frontend.http.json_limits import check_depth
from penstock.shapes import JsonObject

MAX_TOOLS: Final = 1024
MAX_NAME_CHARS: Final = 256

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
    """The choice of one tool, by its name."""

    function: NamedFunction
    type: Literal["function"] | None = "function"

    def __post_init__(self) -> None:
        self.type = "function"


def check_tools(tools: Sequence[Tool] | None, choice: str | NamedTool | None) -> None:
    """Raises RequestRejected for a choice that these tools do not offer, or too deep a schema."""
    for index, tool in enumerate(tools or ()):
        check_depth(tool.function.parameters, f"tools[{index}].function.parameters")
    if choice is None or choice == "none":
        return
    if not tools:
        raise RequestRejected("`tool_choice` needs `tools`.", field="tool_choice")
    if isinstance(choice, NamedTool) and choice.function.name not in (tool.function.name for tool in tools):
        raise RequestRejected(
            f"`tool_choice` names `{choice.function.name}`, which is not among `tools`.",
            field="tool_choice.function.name",
        )


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
