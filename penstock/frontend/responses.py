"""Response bodies of OpenAI's API."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from penstock.frontend.answer import Answer
from penstock.frontend.text.logprobs import LogprobFormat
from penstock.shapes import JsonObject, ModelView, Parsed

OWNER = "penstock"


class Envelope(msgspec.Struct):
    """What every chunk or answer of one call repeats."""

    id: str
    object: str
    created: int  # seconds since 1970
    model: str
    system_fingerprint: str


class Usage(msgspec.Struct):
    """Token counts of a call: its prompts once each, all of its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]
    completion_tokens_details: dict[str, int] | msgspec.UnsetType = msgspec.UNSET


def usage_of(prompt_lengths: Sequence[int], answers: Sequence[Answer]) -> Usage:
    """`answers` holds each prompt's choices, prompt by prompt; the first choice tells what was cached."""
    choices = len(answers) // len(prompt_lengths)
    prompt_tokens = sum(prompt_lengths)
    output_tokens = sum(answer.output_tokens for answer in answers)
    cached_tokens = sum(answer.cached_tokens for answer in answers[::choices])
    usage = Usage(
        prompt_tokens, output_tokens, prompt_tokens + output_tokens, {"cached_tokens": cached_tokens}
    )
    replies = [answer.reply for answer in answers if answer.reply is not None]
    if replies:
        reasoning_tokens = sum(reply.reasoning_tokens for reply in replies)
        usage.completion_tokens_details = {"reasoning_tokens": reasoning_tokens}
    return usage


def fingerprint_of(model: ModelView) -> str:
    return f"fp_{model.revision[:12]}"


def chat_body(
    envelope: Envelope, answers: Sequence[Answer], formats: Sequence[LogprobFormat], usage: Usage
) -> bytes:
    """A whole chat completion. `formats` is empty when no log-probabilities were asked for."""
    choices = []
    for answer in answers:
        text, logprobs = answer.take()
        message: JsonObject = {"role": "assistant", "content": text, "refusal": None}
        if answer.reply is not None:
            message.update(_taken_apart(answer.reply.whole()))
        choices.append(
            {
                "index": answer.index,
                "message": message,
                "logprobs": formats[answer.index].render(logprobs) if formats else None,
                "finish_reason": finish_name(answer),
                "stop_reason": answer.stop_reason,
            }
        )
    return _body(envelope, choices, usage)


def _taken_apart(parsed: Parsed) -> JsonObject:
    """`content`, `reasoning` (vLLM's name for it) and, if there are any, `tool_calls` of a message."""
    message: JsonObject = {"content": parsed.content, "reasoning": parsed.reasoning}
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


def finish_name(answer: Answer) -> str | None:
    """OpenAI's finish_reason; None as long as the answer goes on."""
    reason = answer.finish_reason
    if reason is None or answer.reply is None:
        return reason
    return answer.reply.finish_name(reason)


def completion_body(
    envelope: Envelope, answers: Sequence[Answer], formats: Sequence[LogprobFormat], usage: Usage
) -> bytes:
    """A whole text completion. `formats` as above."""
    choices = []
    for answer in answers:
        text, logprobs = answer.take()
        choices.append(
            {
                "index": answer.index,
                "text": text,
                "logprobs": formats[answer.index].render(logprobs) if formats else None,
                "finish_reason": answer.finish_reason,
                "stop_reason": answer.stop_reason,
            }
        )
    return _body(envelope, choices, usage)


def _body(envelope: Envelope, choices: list[JsonObject], usage: Usage) -> bytes:
    return msgspec.json.encode({**msgspec.structs.asdict(envelope), "choices": choices, "usage": usage})


def model_object(model: ModelView, created: int) -> JsonObject:
    """A model as /v1/models shows it."""
    return {
        "id": model.card.name,
        "object": "model",
        "created": created,
        "owned_by": OWNER,
        "max_model_len": model.card.max_model_len,
    }
