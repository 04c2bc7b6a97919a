"""Request bodies of Anthropic's Messages API, checked field by field.

Types are as strict as for OpenAI's API (frontend/openai.py), null is the same as leaving a field out, and
fields nobody knows are ignored. What a field means is in frontend/anthropic_chat.py.

Source: the API reference at platform.claude.com/docs/en/api/messages, and for the fields beyond it
(cache_salt, chat_template_kwargs, priority) vLLM's server.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from penstock.errors import RequestRejected
from penstock.frontend.decoding import decoded
from penstock.frontend.http.json_limits import check_depth
from penstock.frontend.openai import (
    MAX_MESSAGES,
    MAX_MODEL_CHARS,
    MAX_STOPS,
    Count,
    Salt,
    SessionName,
    StopString,
    TopK,
)
from penstock.frontend.tools import MAX_TOOLS, FunctionName
from penstock.frontend.unserved import (
    HARMLESS,
    REFUSED,
    RefusedField,
    check_refused,
    unsupported,
    with_refused,
)
from penstock.frontend.wording import rejected
from penstock.shapes import JsonObject

_INSTEAD: Final = "/v1/chat/completions has it"
_OF_CHATS: Final = RefusedField((), _INSTEAD)

ANTHROPIC_REFUSED: Final[dict[str, RefusedField]] = {
    "compaction": RefusedField((), "send the whole conversation"),
    "container": RefusedField((), "there is no code execution"),
    "mcp_servers": RefusedField(([],), "connect to the servers yourself, and send their tools as `tools`"),
    "thread": RefusedField((), "nothing is stored; send the whole conversation"),
    # Of OpenAI's API, and vLLM's fields of it
    "allowed_token_ids": _OF_CHATS,
    "bad_words": RefusedField(([],), _INSTEAD),
    "frequency_penalty": RefusedField((0, 0.0), _INSTEAD),
    "ignore_eos": RefusedField((False,), _INSTEAD),
    "logit_bias": RefusedField(({},), _INSTEAD),
    "logprobs": RefusedField((False,), _INSTEAD),
    "max_completion_tokens": RefusedField((), "use `max_tokens`"),
    "min_p": RefusedField((0, 0.0), _INSTEAD),
    "min_tokens": RefusedField((0,), _INSTEAD),
    "n": RefusedField((1,), _INSTEAD),
    "presence_penalty": RefusedField((0, 0.0), _INSTEAD),
    "reasoning_effort": RefusedField((), "use `output_config.effort`"),
    "repetition_penalty": RefusedField((1, 1.0), _INSTEAD),
    "response_format": RefusedField((), "use `output_config.format`"),
    "seed": _OF_CHATS,
    "stop": RefusedField(([],), "use `stop_sequences`"),
    "stop_token_ids": RefusedField(([],), _INSTEAD),
    "structured_outputs": RefusedField((), "use `output_config.format`"),
    # vLLM
    "ec_transfer_params": REFUSED["ec_transfer_params"],
    "kv_transfer_params": REFUSED["kv_transfer_params"],
    "vllm_xargs": REFUSED["vllm_xargs"],
    "watermarking": REFUSED["watermarking"],
}
"""Fields that would change the answer, and are not served."""

_PAYMENT: Final = "says who pays, and how much"
_ELSEWHERE: Final = "chooses among Anthropic's own servers"

ANTHROPIC_HARMLESS: Final[dict[str, str]] = {
    "betas": "names features; those that are not served are refused where they are used",
    "billing_policy": _PAYMENT,
    "cache_control": "says what to cache; every prefix is cached here without being asked for",
    "context_management": "only takes old parts out of a conversation, to save tokens",
    "diagnostics": "asks why a prefix was not cached",
    "fallback_credit_token": _PAYMENT,
    "fallbacks": "names models for what the first one declines; nothing is declined here",
    "inference_geo": _ELSEWHERE,
    "mm_payload": HARMLESS["mm_payload"],
    "return_mm_kwargs": HARMLESS["return_mm_kwargs"],
    "service_tier": _PAYMENT,
    "speed": _PAYMENT,
    "user_profile_id": _PAYMENT,
    "workspace_id": _PAYMENT,
}
"""Fields that change no answer, each with the reason. They may have any value."""


class TextBlock(msgspec.Struct):
    """A block of a text, or of something else that is not served there."""

    type: str
    text: str | UnsetType | None = UNSET


class ContentBlock(TextBlock):
    """A block of a message's content. Which of the fields it has depends on its type."""

    thinking: str | UnsetType | None = UNSET
    id: str | None = None
    name: str | None = None
    input: Any = None  # whatever the model wrote
    tool_use_id: str | None = None
    content: str | list[TextBlock] | JsonObject | None = None
    is_error: bool | None = None


class AnthropicMessage(msgspec.Struct):
    role: Literal["user", "assistant", "system"]
    content: str | list[ContentBlock] | None = None
    clear_at: Literal["never", "next_user_message"] | None = None


class AnthropicTool(msgspec.Struct):
    """A tool of the client's own; any other type is Anthropic's."""

    type: str | None = None
    name: FunctionName | None = None
    description: str | None = None
    input_schema: JsonObject | None = None
    input_examples: list[JsonObject] | None = None
    strict: bool | None = None
    defer_loading: bool | None = None
    allowed_callers: list[str] | None = None


class AnthropicToolChoice(msgspec.Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct):
    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Count | None = None
    display: Literal["summarized", "omitted", "updates"] | None = None


class OutputFormat(msgspec.Struct):
    schema: JsonObject
    type: Literal["json_schema"] | None = None


class OutputConfig(msgspec.Struct):
    """`task_budget` only tells Claude what it may spend."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None
    task_budget: Any = None


class AnthropicMetadata(msgspec.Struct):
    """Of a request."""

    user_id: SessionName | None = None


class ConversationRequest(msgspec.Struct, kw_only=True):
    """POST /v1/messages/count_tokens, and what it shares with /v1/messages."""

    model: Annotated[str, Meta(min_length=1, max_length=MAX_MODEL_CHARS)]
    messages: Annotated[list[AnthropicMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[AnthropicTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # its older place
    chat_template_kwargs: JsonObject | None = None
    metadata: AnthropicMetadata | None = None


class MessagesRequest(ConversationRequest, kw_only=True):
    """POST /v1/messages."""

    max_tokens: Count
    stream: bool | None = None
    stop_sequences: Annotated[list[StopString], Meta(max_length=MAX_STOPS)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: TopK | None = None
    cache_salt: Salt | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None


_MESSAGES: Final = with_refused(MessagesRequest, ANTHROPIC_REFUSED)
_CONVERSATION: Final = with_refused(ConversationRequest, ANTHROPIC_REFUSED)
_MESSAGES_DECODER: Final = msgspec.json.Decoder(_MESSAGES)
_CONVERSATION_DECODER: Final = msgspec.json.Decoder(_CONVERSATION)


def decode_messages(body: bytes) -> MessagesRequest:
    """Raises RequestRejected naming the field."""
    request = decoded(body, _MESSAGES_DECODER, _MESSAGES, _explained)
    _check(request)
    return request


def decode_conversation(body: bytes) -> ConversationRequest:
    """Raises RequestRejected naming the field."""
    request = decoded(body, _CONVERSATION_DECODER, _CONVERSATION, _explained)
    _check(request)
    return request


def _explained(body: bytes, error: msgspec.ValidationError, kind: type[msgspec.Struct]) -> RequestRejected:
    return rejected(error, kind)


def _check(request: ConversationRequest) -> None:
    check_refused({name: getattr(request, name) for name in ANTHROPIC_REFUSED}, ANTHROPIC_REFUSED)
    for index, tool in enumerate(request.tools or ()):
        _check_tool(tool, f"tools[{index}]")
    _check_choice(request.tools, request.tool_choice)
    if request.chat_template_kwargs is not None:
        check_depth(request.chat_template_kwargs, "chat_template_kwargs")
    if request.output_format is not None and request.output_config and request.output_config.format:
        message = "`output_format` and `output_config.format` are the same; send the latter."
        raise RequestRejected(message, field="output_format")


def _check_tool(tool: AnthropicTool, where: str) -> None:
    if tool.type not in (None, "custom"):
        message = (
            f"`{where}.type`: `{tool.type[:80]}` is one of Anthropic's own tools, which are not served;"
            " only tools of type `custom`, with an `input_schema`, are."
        )
        raise RequestRejected(message, code="unsupported_value", field=f"{where}.type")
    for name in ("name", "input_schema"):
        if getattr(tool, name) is None:
            field = f"{where}.{name}"
            raise RequestRejected(f"Missing required field: `{field}`.", code="missing_field", field=field)
    if tool.allowed_callers and "direct" not in tool.allowed_callers:
        raise unsupported(f"{where}.allowed_callers", " without `direct`", "there is no code execution")
    check_depth(tool.input_schema, f"{where}.input_schema")
    check_depth(tool.input_examples, f"{where}.input_examples")


def _check_choice(tools: list[AnthropicTool] | None, choice: AnthropicToolChoice | None) -> None:
    if choice is None or choice.type in ("auto", "none"):
        return
    if not tools:
        raise RequestRejected("`tool_choice` needs `tools`.", field="tool_choice")
    if choice.type == "any":
        return
    if choice.name is None:
        message = "Missing required field: `tool_choice.name`."
        raise RequestRejected(message, code="missing_field", field="tool_choice.name")
    if choice.name not in (tool.name for tool in tools):
        message = f"`tool_choice.name`: `{choice.name}` is not among `tools`."
        raise RequestRejected(message, field="tool_choice.name")
