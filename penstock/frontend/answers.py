"""The answers of the endpoints, as /openapi.json describes them.

They are written as JSON by other modules; `tests/frontend/test_openapi.py` compares the two."""

from __future__ import annotations

from typing import Literal

import msgspec

from penstock.frontend.completion_objects import CallUsage, Envelope
from penstock.shapes import JsonObject


class ChatMessage(msgspec.Struct):
    """What the model answered."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[JsonObject] | None = None


class ChatChoice(msgspec.Struct):
    """One of the `n` answers to a chat."""

    index: int
    message: ChatMessage
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | None
    logprobs: JsonObject | None
    token_ids: list[int] | None = None


class ChatAnswer(Envelope):
    """The answer to a chat. Streamed, it comes in chunks, each the data of an event; `[DONE]` ends them."""

    choices: list[ChatChoice]
    usage: CallUsage
    prompt_token_ids: list[int] | None = None
    prompt_text: str | None = None
    prompt_logprobs: list[JsonObject | None] | None = None
    nvext: JsonObject | None = None


class CompletionChoice(msgspec.Struct):
    """One of the `n` answers to a prompt."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None
    logprobs: JsonObject | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[JsonObject | None] | None = None


class CompletionAnswer(Envelope):
    """The continuation of prompts. Streamed, it comes as that of a chat does."""

    choices: list[CompletionChoice]
    usage: CallUsage
    nvext: JsonObject | None = None


class ResponseAnswer(msgspec.Struct):
    """A response, with what was asked for repeated. Streamed, its events have OpenAI's names and order."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["completed", "incomplete", "failed", "in_progress"]
    model: str
    output: list[JsonObject]
    error: JsonObject | None
    incomplete_details: JsonObject | None
    usage: JsonObject | None
    background: bool
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    prompt_cache_retention: str | None
    reasoning: JsonObject
    safety_identifier: str | None
    service_tier: str
    store: bool
    temperature: float
    text: JsonObject
    tool_choice: str | JsonObject
    tools: list[JsonObject]
    top_logprobs: int
    top_p: float
    truncation: str
    user: str | None


class DeletedResponse(msgspec.Struct):
    """A stored response that is stored no longer."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputTokens(msgspec.Struct):
    """The tokens of a conversation's prompt."""

    object: Literal["response.input_tokens"]
    input_tokens: int


class ItemList(msgspec.Struct):
    """A page of the input items of a stored response."""

    object: Literal["list"]
    data: list[JsonObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class MessageUsage(msgspec.Struct):
    """Token counts of a call in Anthropic's form."""

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int


class MessageAnswer(msgspec.Struct):
    """The answer to a chat in Anthropic's form. Streamed, its events have Anthropic's names and order."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[JsonObject]
    usage: MessageUsage
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None


class TokenCount(msgspec.Struct):
    """The tokens of a chat's prompt."""

    input_tokens: int


class Tokenized(msgspec.Struct):
    """A prompt's token ids."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(msgspec.Struct):
    """The text of token ids."""

    prompt: str


class ModelObject(msgspec.Struct):
    """A model under one of its names."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    type: Literal["model"]
    display_name: str
    created_at: str
    lifecycle: str
    max_input_tokens: int
    max_tokens: int


class ModelList(msgspec.Struct):
    """The served models, each once for each of its names."""

    object: Literal["list"]
    data: list[ModelObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


class Health(msgspec.Struct):
    """Whether every expected role is connected, and each worker with its load."""

    status: Literal["healthy", "unhealthy"]
    missing: list[str]
    draining: bool
    discovery: str
    instances: list[JsonObject]


class Live(msgspec.Struct):
    """The process responds."""

    status: Literal["live"]


class Version(msgspec.Struct):
    """Penstock's version."""

    version: str


class Error(msgspec.Struct):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(msgspec.Struct):
    """An error in OpenAI's form."""

    error: Error


class AnthropicError(msgspec.Struct):
    """What is wrong."""

    type: str
    message: str


class AnthropicErrorAnswer(msgspec.Struct):
    """An error in Anthropic's form."""

    type: Literal["error"]
    error: AnthropicError
    request_id: str
