"""What a request of Anthropic's Messages API means, as a chat request: so that templates, tools, parsers
and sampling are the same for both.

As for chats, nothing that a model may have written refuses a conversation (frontend/messages.py): cut
or odd inputs of tools, empty texts, thinking with any signature or none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Literal, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from penstock.errors import RequestRejected
from penstock.frontend.anthropic import (
    AnthropicMessage,
    AnthropicTool,
    AnthropicToolChoice,
    ContentBlock,
    ConversationRequest,
    MessagesRequest,
    OutputFormat,
    TextBlock,
)
from penstock.frontend.messages import FunctionCall, Message, ToolCall, as_arguments, without_billing_line
from penstock.frontend.openai import ChatRequest
from penstock.frontend.structured import JsonSchemaFormat, NamedSchema, checked
from penstock.frontend.tools import Function, Tool, ToolChoice, selection_of
from penstock.shapes import JsonObject, StructuredOutput

_SERVED: Final = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
    "system": ("text",),
    "tool_result": ("text",),
}
"""Types of content blocks, by where they are: in a message of this role, or in a tool's result."""

_CHOICES: Final[dict[str, Literal["auto", "required", "none"]]] = {
    "auto": "auto",
    "any": "required",
    "none": "none",
}

Block = TypeVar("Block", bound=TextBlock)
Placed = tuple[str, Block]
"""A block, and its path."""


def chat_request(request: ConversationRequest) -> ChatRequest:
    """The chat request that asks for the same. Raises RequestRejected naming the field at fault."""
    messages = _messages(request)
    config, choice = request.output_config, request.tool_choice
    format, where = request.output_format, "output_format"
    if config is not None and config.format is not None:
        format, where = config.format, "output_config.format"
    chat = ChatRequest(
        model=request.model,
        messages=messages,
        tools=[_tool(tool) for tool in request.tools] if request.tools else None,
        tool_choice=_choice(choice) if request.tools and choice is not None else None,
        parallel_tool_calls=False if choice is not None and choice.disable_parallel_tool_use else None,
        response_format=_format(format, f"{where}.schema") if format is not None else None,
        reasoning_effort=config.effort if config is not None else None,
        chat_template_kwargs=_template_variables(request),
    )
    if request.metadata is not None:
        chat.prompt_cache_key = request.metadata.user_id
    last = messages[-1]
    if last.role == "assistant" and not last.tool_calls:  # the beginning of the answer
        chat.add_generation_prompt, chat.continue_final_message = False, True
    if isinstance(request, MessagesRequest):
        chat.max_tokens = request.max_tokens
        chat.stop = request.stop_sequences
        if request.thinking is not None and request.thinking.type == "enabled":
            chat.thinking_token_budget = request.thinking.budget_tokens
        for name in ("stream", "temperature", "top_p", "top_k", "cache_salt", "priority"):
            setattr(chat, name, getattr(request, name))
    return chat


def _template_variables(request: ConversationRequest) -> JsonObject | None:
    """Templates that can switch reasoning on or off know one of these two names. Which one counts is also
    what the parsers of reasoning look at."""
    thinking, given = request.thinking, request.chat_template_kwargs
    if thinking is None:
        return given
    on = thinking.type != "disabled"
    return {"enable_thinking": on, "thinking": on, **(given or {})}


def _tool(tool: AnthropicTool) -> Tool:
    assert tool.name is not None  # checked when it was decoded
    schema = tool.input_schema
    if schema is not None and tool.input_examples:
        schema = {**schema, "examples": tool.input_examples}  # JSON Schema's name for the same
    function = Function(tool.name, tool.description, schema, tool.strict, tool.defer_loading)
    return Tool(function)


def _choice(choice: AnthropicToolChoice) -> ToolChoice:
    if choice.name is not None and choice.type == "tool":
        return selection_of(choice.name)
    return _CHOICES[choice.type]


def _format(format: OutputFormat, where: str) -> JsonSchemaFormat:
    checked(StructuredOutput("json", msgspec.json.encode(format.schema).decode()), where)
    return JsonSchemaFormat(NamedSchema("output", format.schema, strict=True))


# --- messages -------------------------------------------------------------------------------------


def _messages(request: ConversationRequest) -> list[Message]:
    shown = []
    if system := _system_text(_blocks(request.system, "system", TextBlock)):
        shown.append(Message("system", system))
    for role, blocks in _turns(request.messages):
        if role == "user":
            shown += _user_messages(blocks)
        elif role == "assistant":
            shown.append(_assistant_message(blocks))
        elif system := _system_text(blocks):
            shown.append(Message("system", system))
    if not shown:
        raise RequestRejected("`messages` has no text.", field="messages")
    return shown


def _turns(messages: Sequence[AnthropicMessage]) -> Iterator[tuple[str, list[Placed[ContentBlock]]]]:
    """Roles with their blocks; consecutive messages of one role are one."""
    last_user = max((index for index, message in enumerate(messages) if message.role == "user"), default=-1)
    role, blocks = "", list[Placed[ContentBlock]]()
    for index, message in enumerate(messages):
        where = f"messages[{index}].content"
        if message.content is None and message.role != "assistant":
            raise RequestRejected(f"Missing required field: `{where}`.", code="missing_field", field=where)
        if message.clear_at == "next_user_message" and index < last_user:
            continue
        if message.role != role and role:
            yield role, blocks
            blocks = []
        role = message.role
        blocks += _blocks(message.content, where, ContentBlock)
    if role:
        yield role, blocks


def _blocks(content: str | list[Block] | None, where: str, kind: type[Block]) -> list[Placed[Block]]:
    if isinstance(content, list):
        return [(f"{where}[{index}]", block) for index, block in enumerate(content)]
    return [(where, kind("text", content))] if content else []


def _system_text(blocks: Sequence[Placed[TextBlock]]) -> str:
    _check_types(blocks, "system")
    return _joined([without_billing_line(_text(block.text, where)) for where, block in blocks])


def _user_messages(blocks: Sequence[Placed[ContentBlock]]) -> list[Message]:
    """Results of tools first, each as a message of its own, as templates want them."""
    _check_types(blocks, "user")
    shown, texts = [], []
    for where, block in blocks:
        if block.type == "tool_result":
            shown.append(Message("tool", _result_text(block, where), tool_call_id=block.tool_use_id))
        else:
            texts.append(_text(block.text, where))
    if texts or not shown:
        shown.append(Message("user", _joined(texts)))
    return shown


def _assistant_message(blocks: Sequence[Placed[ContentBlock]]) -> Message:
    _check_types(blocks, "assistant")
    texts, thoughts, calls = [], [], []
    for where, block in blocks:
        if block.type == "text":
            texts.append(_text(block.text, where))
        elif block.type == "thinking":
            thoughts.append(_text(block.thinking, where, "thinking"))
        elif block.type == "tool_use":
            if block.name is None:
                raise _missing(f"{where}.name")
            arguments = as_arguments(block.input, block.name, f"{where}.input")
            calls.append(ToolCall(FunctionCall(block.name, arguments), block.id, "function"))
    reasoning = _joined(thoughts) or None
    return Message("assistant", _joined(texts), tool_calls=calls or None, reasoning=reasoning)


def _result_text(block: ContentBlock, where: str) -> str:
    """What a tool has given. Templates have no other place for its having failed than the text."""
    where = f"{where}.content"
    if isinstance(block.content, dict):
        message = f"`{where}` must be a string or a list of blocks, not an object."
        raise RequestRejected(message, field=where)
    blocks = _blocks(block.content, where, TextBlock)
    _check_types(blocks, "tool_result")
    text = _joined([_text(inner.text, place) for place, inner in blocks])
    return f"Error: {text}" if block.is_error else text


def _text(text: str | UnsetType | None, where: str, name: str = "text") -> str:
    if text is UNSET:
        raise _missing(f"{where}.{name}")
    return text or ""


def _joined(texts: Sequence[str]) -> str:
    return "\n".join([text for text in texts if text])


def _missing(field: str) -> RequestRejected:
    return RequestRejected(f"Missing required field: `{field}`.", code="missing_field", field=field)


def _check_types(blocks: Sequence[Placed[TextBlock]], place: str) -> None:
    for where, block in blocks:
        if block.type not in _SERVED[place]:
            served = ", ".join(f"`{name}`" for name in _SERVED[place])
            message = (
                f"`{where}.type`: blocks of type `{block.type[:80]}` are not served in `{place}`,"
                f" only {served}: no images, documents, search results, or tools of Anthropic's own."
            )
            raise RequestRejected(message, code="unsupported_value", field=f"{where}.type")
