"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Final

from msgspec.structs import replace

from penstock.errors import PenstockError
from penstock.frontend.answers import AnthropicErrorAnswer, MessageAnswer, TokenCount
from penstock.frontend.anthropic import (
    ConversationRequest,
    MessagesRequest,
    decode_conversation,
    decode_messages,
)
from penstock.frontend.anthropic_chat import chat_request
from penstock.frontend.chat import Chat
from penstock.frontend.choice import Choice
from penstock.frontend.endpoint import Beginning, Operation, PromptEncoder
from penstock.frontend.http.statuses import anthropic_error
from penstock.frontend.messages import as_arguments
from penstock.frontend.sse import encode
from penstock.frontend.tool_shapes import ToolShape, naming_tool_shapes
from penstock.ports import CALL_ID_PREFIX
from penstock.shapes import FinishReason, JsonObject, Parsed, ToolCallDelta

_DELTA_EVENT: Final = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":'
_DELTAS: Final = {
    "text": b'{"type":"text_delta","text":',
    "thinking": b'{"type":"thinking_delta","thinking":',
    "tool_use": b'{"type":"input_json_delta","partial_json":',
}
"""How the delta of each type of block begins; then its text follows."""


class Messages:
    """A GenerationApi whose objects are Endpoints: Anthropic's Messages in terms of a Chat."""

    name: ClassVar = "messages"
    id_prefix: ClassVar = "msg_"
    operation: ClassVar = Operation(
        summary="Answers a chat in the form of Anthropic's Messages API, whole or streamed.",
        request=MessagesRequest,
        answer=MessageAnswer,
        error=AnthropicErrorAnswer,
        streams=True,
    )

    def __init__(self, request: MessagesRequest) -> None:
        self._chat = Chat(chat_request(request))
        place = "output_format" if request.output_format is not None else "output_config.format"
        self.wanted = replace(
            self._chat.wanted, structured_field=place, needs_reasoning=False, any_max_tokens=True
        )
        thinking = request.thinking
        self._shows_thinking = thinking is None or thinking.display != "omitted"

    @staticmethod
    def error_object(error: PenstockError) -> JsonObject:
        return anthropic_error(error)

    @classmethod
    def decode(cls, body: bytes) -> Messages:
        with naming_tool_shapes(body, ToolShape.MESSAGES):
            return cls(decode_messages(body))

    async def choices(self, beginning: Beginning) -> list[Choice]:
        return await self._chat.choices(beginning)

    async def body(self, beginning: Beginning, choices: Sequence[Choice]) -> bytes:
        (choice,) = choices
        text, _ = choice.take()
        parsed = Parsed(text) if choice.reply is None else choice.whole_reply(choice.reply)
        blocks = _blocks(parsed, beginning.answer_id, shows_thinking=self._shows_thinking)
        message = _message(beginning, choice, blocks)
        return encode({**message, **_stop(choice, called=bool(parsed.tool_calls))})

    def stream(self, beginning: Beginning, choices: Sequence[Choice]) -> MessageEvents:
        return MessageEvents(beginning, shows_thinking=self._shows_thinking)


class CountTokens:
    """A PromptApi whose objects are PromptEndpoints: how many tokens the prompt of such a message has."""

    name: ClassVar = "count_tokens"
    operation: ClassVar = Operation(
        summary="Counts the tokens of a chat's prompt.",
        request=ConversationRequest,
        answer=TokenCount,
        error=AnthropicErrorAnswer,
    )

    def __init__(self, request: ConversationRequest) -> None:
        self.model = request.model
        self._chat = Chat(chat_request(request))

    @staticmethod
    def error_object(error: PenstockError) -> JsonObject:
        return anthropic_error(error)

    @classmethod
    def decode(cls, body: bytes) -> CountTokens:
        with naming_tool_shapes(body, ToolShape.MESSAGES):
            return cls(decode_conversation(body))

    async def answer(self, prompts: PromptEncoder) -> JsonObject:
        return {"input_tokens": len(await self._chat.prompt(prompts))}


class MessageEvents:
    """Writes a message as Anthropic's events. Its blocks come one after another, each with a start, deltas
    and a stop."""

    def __init__(self, beginning: Beginning, *, shows_thinking: bool) -> None:
        self._beginning = beginning
        self._shows_thinking = shows_thinking
        self._begun = False
        self._called = False
        self._blocks = 0  # begun
        self._open = ""  # the type of the block that is open; empty when none is
        self._call = 0  # the number of the call that the open block is
        self._head = b""  # of the open block's deltas
        self._held: list[str] = []  # text that came within a call

    def chunk(self, choice: Choice) -> bytes:
        """What is new, as one event for each part."""
        events = [] if self._begun else self._begin(choice)
        text, _ = choice.take()
        if choice.reply is None:
            if text:
                self._add("text", text, events)
            return b"".join(events)
        for parsed in choice.reply.take():
            if parsed.reasoning:
                self._add("thinking", parsed.reasoning, events)
            if parsed.content:
                self._add("text", parsed.content, events)
            for call in parsed.tool_calls:
                self._add_call(call, events)
        return b"".join(events)

    async def end(self, choices: Sequence[Choice]) -> bytes:
        """The end of the last block and of the message. A message has one block at least."""
        (choice,) = choices
        events: list[bytes] = []
        self._close(events)
        if not self._blocks:
            self._start("text", {"text": ""}, events)
            self._close(events)
        delta = _stop(choice, called=self._called)
        events += [
            _event("message_delta", delta=delta, usage=_usage(choice)),
            _event("message_stop"),
        ]
        return b"".join(events)

    def failed(self, error: PenstockError) -> bytes:
        """Tells of a failure after the response has begun; nothing follows."""
        return _event(**anthropic_error(error, self._beginning.http_request_id))

    def _begin(self, choice: Choice) -> list[bytes]:
        self._begun = True
        message = {**_message(self._beginning, choice, []), "stop_reason": None, "stop_sequence": None}
        return [_event("message_start", message=message), _event("ping")]

    def _add(self, kind: str, text: str, events: list[bytes]) -> None:
        if self._open == "tool_use":
            # The call may go on after it, and a block that has ended cannot.
            self._held.append(text)
            return
        if self._open != kind:
            self._start(kind, {kind: ""} | ({"signature": ""} if kind == "thinking" else {}), events)
        if kind == "text" or self._shows_thinking:
            events.append(self._delta(text))

    def _add_call(self, call: ToolCallDelta, events: list[bytes]) -> None:
        if call.name is not None and (self._open != "tool_use" or self._call != call.index):
            self._called, self._call = True, call.index
            self._start("tool_use", {"id": _use_id(call), "name": call.name, "input": {}}, events)
        if call.arguments:
            events.append(self._delta(call.arguments))

    def _start(self, kind: str, fields: JsonObject, events: list[bytes]) -> None:
        self._close(events)
        index = self._blocks
        self._blocks, self._open = index + 1, kind
        self._head = _DELTA_EVENT % index + _DELTAS[kind]
        events.append(_event("content_block_start", index=index, content_block={"type": kind, **fields}))

    def _delta(self, text: str) -> bytes:
        return b"".join((self._head, encode(text), b"}}\n\n"))

    def _close(self, events: list[bytes]) -> None:
        if not self._open:
            return
        index = self._blocks - 1
        if self._open == "thinking":
            signature = {"type": "signature_delta", "signature": self._beginning.answer_id}
            events.append(_event("content_block_delta", index=index, delta=signature))
        events.append(_event("content_block_stop", index=index))
        self._open = ""
        if self._held:
            held, self._held = "".join(self._held), []
            self._add("text", held, events)
            self._close(events)


def _event(type: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (type.encode(), encode({"type": type, **fields}))


def _message(beginning: Beginning, choice: Choice, blocks: Sequence[JsonObject]) -> JsonObject:
    return {
        "id": beginning.answer_id,
        "type": "message",
        "role": "assistant",
        "model": beginning.model.name,
        "content": blocks,
        "usage": _usage(choice),
    }


def _blocks(parsed: Parsed, signature: str, *, shows_thinking: bool) -> list[JsonObject]:
    """An answer's blocks, one at least. The signature of thinking proves nothing here, and any is accepted
    when it comes back; clients want one."""
    blocks: list[JsonObject] = []
    if parsed.reasoning:
        thinking = parsed.reasoning if shows_thinking else ""
        blocks.append({"type": "thinking", "thinking": thinking, "signature": signature})
    if parsed.content:
        blocks.append({"type": "text", "text": parsed.content})
    for call in parsed.tool_calls:
        name = call.name or ""
        given = as_arguments(call.arguments, name, "the input of an answer's tool_use")
        blocks.append({"type": "tool_use", "id": _use_id(call), "name": name, "input": given})
    return blocks or [{"type": "text", "text": ""}]


def _use_id(call: ToolCallDelta) -> str:
    """A call's id in Anthropic's form, unless the model's format has ids of its own."""
    given = call.id or ""
    return given.replace(CALL_ID_PREFIX, "toolu_", 1) if given.startswith(CALL_ID_PREFIX) else given


def _stop(choice: Choice, *, called: bool) -> JsonObject:
    """Why the answer ended. One that was cut must not have its last call run."""
    sequence = choice.stop_reason if isinstance(choice.stop_reason, str) else None
    if choice.finish_reason is FinishReason.LENGTH:
        reason = "max_tokens"
    elif sequence is not None:
        reason = "stop_sequence"
    else:
        reason = "tool_use" if called else "end_turn"
    return {"stop_reason": reason, "stop_sequence": sequence}


def _usage(choice: Choice) -> JsonObject:
    """What was found in a cache does not count as input. Nobody pays for filling one."""
    prompt_tokens = len(choice.request.token_ids)
    usage: JsonObject = {
        "input_tokens": prompt_tokens - choice.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": choice.cached_tokens,
        "output_tokens": choice.output_tokens,
    }
    if choice.reply is not None and choice.finish_reason is not None:
        usage["output_tokens_details"] = {"thinking_tokens": choice.reply.reasoning_tokens}
    return usage
