"""What the answers of OpenAI's two completion APIs have in common, and the list of models."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

import msgspec

from penstock.frontend.choice import Choice
from penstock.frontend.endpoint import Beginning
from penstock.frontend.text.logprobs import prompt_entries
from penstock.shapes import JsonObject, ModelView

OWNER: Final = "penstock"

NUMBERS_AT_ONCE: Final = 2048
"""Log-probabilities that are written without letting other calls run."""


class Envelope(msgspec.Struct):
    """What every chunk or answer of one call repeats."""

    id: str
    object: str
    created: int  # seconds since 1970
    model: str
    system_fingerprint: str


def envelope_of(beginning: Beginning, object: str) -> Envelope:
    """`object` is OpenAI's name for the kind of response."""
    fingerprint = f"fp_{beginning.revision[:12]}"
    return Envelope(beginning.answer_id, object, beginning.created, beginning.model.name, fingerprint)


class CallUsage(msgspec.Struct):
    """Token counts of a call: its prompts once each, all of its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]
    completion_tokens_details: dict[str, int] | msgspec.UnsetType = msgspec.UNSET


def usage_of(choices: Sequence[Choice]) -> CallUsage:
    """Each prompt's first choice tells what of the prompt was cached."""
    firsts = [choice for choice in choices if choice.first_of_prompt]
    prompt_tokens = sum(len(choice.request.token_ids) for choice in firsts)
    output_tokens = sum(choice.output_tokens for choice in choices)
    cached_tokens = sum(choice.cached_tokens for choice in firsts)
    usage = CallUsage(
        prompt_tokens, output_tokens, prompt_tokens + output_tokens, {"cached_tokens": cached_tokens}
    )
    replies = [choice.reply for choice in choices if choice.reply is not None]
    if replies:
        reasoning_tokens = sum(reply.reasoning_tokens for reply in replies)
        usage.completion_tokens_details = {"reasoning_tokens": reasoning_tokens}
    return usage


async def prompt_logprobs_of(beginning: Beginning, choice: Choice) -> JsonObject:
    """`prompt_logprobs` as vLLM has them; nothing where they are not shown. Other calls run meanwhile:
    there may be many."""
    top, tokens = beginning.wanted.prompt_logprobs, choice.prompt_logprobs
    if top is None or tokens is None:
        return {}
    parts = [b"[null"]  # the first token follows nothing
    at_once = max(1, NUMBERS_AT_ONCE // (top + 1))
    for at in range(0, len(tokens), at_once):
        entries = prompt_entries(tokens[at : at + at_once], beginning.text.token_bytes, top)
        parts.append(msgspec.json.encode(entries)[1:-1])
        await asyncio.sleep(0)
    return {"prompt_logprobs": msgspec.Raw(b",".join(parts) + b"]")}


def finish_name(choice: Choice) -> str | None:
    """OpenAI's finish_reason; None as long as the answer goes on."""
    reason = choice.finish_reason
    if reason is None or choice.reply is None:
        return reason
    return choice.reply.finish_name(reason)


def answer_body(
    envelope: Envelope,
    shown: list[JsonObject],
    choices: Sequence[Choice],
    more: JsonObject | None = None,
) -> bytes:
    """A whole answer; `shown` are its choices as JSON, `more` is beside them."""
    usage = usage_of(choices)
    answer = {**msgspec.structs.asdict(envelope), "choices": shown, "usage": usage, **(more or {})}
    return msgspec.json.encode(answer)


def model_object(name: str, model: ModelView, created: int) -> JsonObject:
    """A model as /v1/models shows it under one of its names: OpenAI's fields, vLLM's `max_model_len`, and
    Anthropic's fields."""
    limit = model.card.max_model_len
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": OWNER,
        "max_model_len": limit,
        "type": "model",
        "display_name": name,
        "created_at": datetime.fromtimestamp(created, UTC).isoformat(),
        "lifecycle": "active",
        "max_input_tokens": limit,
        "max_tokens": limit,
    }


def model_list(models: Sequence[JsonObject]) -> JsonObject:
    """All models, in one page: OpenAI's list, with what Anthropic's has beside it."""
    first, last = (models[0]["id"], models[-1]["id"]) if models else (None, None)
    return {"object": "list", "data": models, "has_more": False, "first_id": first, "last_id": last}
