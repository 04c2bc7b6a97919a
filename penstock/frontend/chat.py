"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import msgspec

from penstock.errors import PenstockError, RequestRejected
from penstock.frontend.allowed_calls import AllowedCallParser
from penstock.frontend.answers import ChatAnswer
from penstock.frontend.choice import Choice
from penstock.frontend.completion_objects import (
    answer_body,
    envelope_of,
    finish_name,
    prompt_logprobs_of,
)
from penstock.frontend.endpoint import Beginning, Operation, PromptEncoder
from penstock.frontend.http.statuses import error_object
from penstock.frontend.messages import openai_messages, template_messages
from penstock.frontend.nvext import nvext_fields, nvext_of
from penstock.frontend.openai import ChatRequest, decode_chat, wanted_of
from penstock.frontend.reply import ReplyRules, text_alone
from penstock.frontend.sse import Chunks, encode
from penstock.frontend.structured import JsonSchemaFormat, ResponseFormat
from penstock.frontend.text.chat_template import TemplateInput
from penstock.frontend.text.logprobs import ChatLogprobs
from penstock.frontend.tool_shapes import ToolShape, naming_tool_shapes
from penstock.frontend.tools import template_tools
from penstock.ports import CallParser
from penstock.shapes import JsonObject, Parsed, TokenLogprob, ToolCallDelta


class Chat:
    """A GenerationApi whose objects are Endpoints: messages in, the next message out."""

    name: ClassVar = "chat_completions"
    id_prefix: ClassVar = "chatcmpl-"
    operation: ClassVar = Operation(
        summary="Answers a chat, whole or streamed.", request=ChatRequest, answer=ChatAnswer, streams=True
    )

    def __init__(self, request: ChatRequest) -> None:
        newer = request.max_completion_tokens is not None
        self.wanted = wanted_of(
            request,
            max_tokens=request.max_completion_tokens if newer else request.max_tokens,
            max_tokens_field="max_completion_tokens" if newer else "max_tokens",
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        )
        self._request = request  # for the template and the model's parser, which take most of its fields
        self._beside: JsonObject = {}  # what is shown of the prompt, beside the choices

    @staticmethod
    def error_object(error: PenstockError) -> JsonObject:
        return error_object(error)

    @classmethod
    def decode(cls, body: bytes) -> Chat:
        with naming_tool_shapes(body, ToolShape.CHAT):
            return cls(decode_chat(body))

    async def choices(self, beginning: Beginning) -> list[Choice]:
        rules = self._reply_rules(beginning)
        prompt = await self.prompt(beginning)
        return beginning.choices([prompt], ChatLogprobs, rules)

    async def prompt(self, prompts: PromptEncoder) -> list[int]:
        """The token ids of the conversation, as the model's template writes it. Raises RequestRejected."""
        text = prompts.text.chat_prompt(prompts.model.name, template_input_of(self._request))
        if self._request.return_prompt_text:
            self._beside = {"prompt_text": text}
        special = bool(self._request.add_special_tokens)
        return (await prompts.encode([text], add_special_tokens=special))[0]

    def _reply_rules(self, beginning: Beginning) -> ReplyRules | None:
        """How the answers are taken apart; None when they are plain text."""
        request, model, parser = self._request, beginning.model, beginning.text.parser
        tool_parser = model.answering.tool_parser
        if request.calls_tools and (parser is None or not tool_parser):
            reason = "no parser for tool calls was named to its workers (--tool-call-parser)"
            if tool_parser:
                reason = f"this frontend has no vLLM, whose parser {tool_parser} that needs"
            message = f"`{model.name}` cannot call tools: {reason}."
            raise RequestRejected(message, code="unsupported_value", field="tools")
        if parser is None:
            return None
        fields = _set_fields(request)
        if not beginning.holds_schemas:
            _drop_schemas(fields, request.response_format)
        call_parser: CallParser = parser.begin(fields)
        allowed, choice = request.allowed_tools, request.tool_choice
        if allowed is not None:
            call_parser, choice = AllowedCallParser(call_parser, allowed.names), allowed.mode
        return ReplyRules(
            call_parser,
            stream=bool(request.stream),
            required=choice == "required",
            auto=request.calls_tools and choice in (None, "auto"),
            show_tokens=request.include_reasoning is not False,
        )

    async def body(self, beginning: Beginning, choices: Sequence[Choice]) -> bytes:
        shown = []
        for choice in choices:
            text, logprobs = choice.take()
            message: JsonObject = {"role": "assistant", "content": text, "refusal": None}
            if choice.reply is not None:
                parsed = choice.whole_reply(choice.reply)
                message.update(_taken_apart(parsed, reasoned=choice.reply.reasoning_tokens > 0))
            fields = {
                "index": choice.index,
                "message": message,
                "logprobs": choice.render_logprobs(logprobs),
                "finish_reason": finish_name(choice),
                "stop_reason": choice.stop_reason,
            }
            if choice.shows_token_ids:
                fields["token_ids"] = choice.take_token_ids()
            shown.append(fields)
        more = nvext_fields(beginning, choices) | await prompt_logprobs_of(beginning, choices[0])
        more |= self._beside
        if choices[0].shows_token_ids:
            more["prompt_token_ids"] = choices[0].request.token_ids
        return answer_body(envelope_of(beginning, "chat.completion"), shown, choices, more)

    def stream(self, beginning: Beginning, choices: Sequence[Choice]) -> ChatChunks:
        kind = ChatChunks if choices[0].reply is None else ReplyChunks
        envelope = envelope_of(beginning, "chat.completion.chunk")
        return kind(
            envelope,
            len(choices),
            include_usage=self._request.include_usage,
            continuous_usage=self._request.continuous_usage,
            nvext=nvext_of(beginning),
            beside_first=self._beside,
        )


class ChatChunks(Chunks):
    """Chunks whose text is in `delta`, the first one of a choice with its role."""

    before = b'"delta":{"content":'
    first = b'"delta":{"role":"assistant","content":'
    close = b"}"
    prompt_in_choice = False


class ReplyChunks(ChatChunks):
    """Chunks of replies: answers that the model's parser takes apart."""

    def chunk(self, choice: Choice) -> bytes:
        """One chunk for each part of what is new; the last one says how the answer goes on."""
        _, logprobs = choice.take()
        token_ids = choice.take_token_ids()
        parts = choice.reply.take() if choice.reply is not None else []
        says_more = choice.finish_reason is not None or logprobs or token_ids or self._continuous_usage
        later_opening = self._later_opens[choice.index]
        begun = self._opens[choice.index] is later_opening
        if len(parts) == 1 and not says_more and begun:
            text = text_alone(parts[0])
            if text is not None:
                return b"".join((later_opening, encode(text), self._plain))
        deltas = _deltas(choice, parts, logprobs, token_ids)
        if not deltas:
            return b""
        if not begun:
            self._opens[choice.index] = later_opening
            deltas[0] = {"role": "assistant", **deltas[0]}
        opening = self.opening(choice.index) + b'"delta":'
        chunks = [b"".join((opening, encode(delta), self.going_on)) for delta in deltas[:-1]]
        chunks.append(b"".join((opening, encode(deltas[-1]), self.ending(choice, logprobs, token_ids))))
        if not begun:
            first = self.opening(choice.index, first=True) + b'"delta":'
            chunks[0] = first + chunks[0].removeprefix(opening)
        return b"".join(chunks)


def template_input_of(request: ChatRequest) -> TemplateInput:
    """What the model's template is shown."""
    return TemplateInput(
        template_messages(request.messages),
        template_tools(request.tools),
        request.documents,
        request.template_variables,
        add_generation_prompt=request.add_generation_prompt is not False,
        continue_final_message=bool(request.continue_final_message),
    )


def _deltas(
    choice: Choice,
    parts: Sequence[Parsed],
    logprobs: Sequence[TokenLogprob],
    token_ids: list[int] | None,
) -> list[JsonObject]:
    """What is new of a reply, with an empty one when there is more to say of the choice than that."""
    deltas = [_delta(parsed) for parsed in parts]
    tokens_shown = bool(token_ids or (logprobs and choice.shows_logprobs))
    if not deltas and (choice.finish_reason is not None or tokens_shown):
        deltas.append({})
    return deltas


def _delta(parsed: Parsed) -> JsonObject:
    """A part of an answer, as OpenAI's `delta`. Reasoning is beside `content` under both of its names:
    vLLM's `reasoning`, and `reasoning_content`, which SGLang's and Dynamo's clients read."""
    delta: JsonObject = {}
    if parsed.reasoning is not None:
        delta["reasoning"] = delta["reasoning_content"] = parsed.reasoning
    if parsed.content is not None:
        delta["content"] = parsed.content
    if parsed.tool_calls:
        delta["tool_calls"] = [_call_delta(call) for call in parsed.tool_calls]
    return delta


def _call_delta(call: ToolCallDelta) -> JsonObject:
    function = {"name": call.name, "arguments": call.arguments}
    delta: JsonObject = {
        "index": call.index,
        "function": {name: value for name, value in function.items() if value is not None},
    }
    return {"id": call.id, "type": "function", **delta} if call.id is not None else delta


def _taken_apart(parsed: Parsed, *, reasoned: bool) -> JsonObject:
    """`content`, `reasoning` (under both of its names) and, if there are any, `tool_calls` of a message.
    An answer that is nothing else, and no reasoning that is hidden from the client, is an empty text."""
    reasoning = parsed.reasoning
    is_empty = parsed.content is None and not reasoned and not parsed.tool_calls
    message: JsonObject = {
        "content": "" if is_empty else parsed.content,
        "reasoning": reasoning,
        "reasoning_content": reasoning,
    }
    if parsed.tool_calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in parsed.tool_calls
        ]
    return message


def _drop_schemas(fields: JsonObject, format: ResponseFormat | None) -> None:
    """Let the arguments of tools that are not strict be any object, and an answer of a format that is not
    strict be any JSON of its type: OpenAI promises no more of them, and their schemas may say what no
    engine can hold a text to."""
    if isinstance(format, JsonSchemaFormat) and format.json_schema.hint is not None:
        fields["response_format"]["json_schema"]["schema"] = format.json_schema.hint
    for tool in fields.get("tools", ()):
        if not tool["function"].get("strict"):
            tool["function"]["parameters"] = {"type": "object"}


def _set_fields(request: ChatRequest) -> JsonObject:
    """What the client has set, as JSON; with the tools that may be called as the only ones."""
    given = {name: getattr(request, name) for name in request.__struct_fields__ if name != "messages"}
    fields = {name: value for name, value in given.items() if value is not None}
    shown: JsonObject = msgspec.to_builtins(fields, str_keys=True)
    allowed = request.allowed_tools
    if allowed is not None:
        shown["tools"] = [tool for tool in shown["tools"] if tool["function"]["name"] in allowed.names]
        shown["tool_choice"] = allowed.mode
    return shown | {"messages": openai_messages(request.messages)}
