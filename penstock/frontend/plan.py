"""What a checked request body comes to: one tokenized request and one empty answer per choice."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Final

import msgspec

from penstock.errors import RequestRejected
from penstock.frontend.answer import Answer
from penstock.frontend.messages import openai_messages
from penstock.frontend.openai import ChatRequest, CompletionRequest
from penstock.frontend.reply import Reply
from penstock.frontend.sampling import (
    check_vocabulary,
    choice_seed,
    first_seed,
    sampling_of,
    too_long,
    with_room,
)
from penstock.frontend.settings import FrontendSettings
from penstock.frontend.text.logprobs import ChatLogprobs, CompletionLogprobs, LogprobFormat
from penstock.frontend.text.preprocess import ModelText, Preprocessor
from penstock.frontend.text.stop_strings import StopMatcher
from penstock.frontend.text.tokenizing import Caller
from penstock.ports import CallParser
from penstock.shapes import JsonObject, ModelView, Request, Sampling

MAX_CALL_TOKENS: Final = 4 * 1024 * 1024
"""Prompt tokens of all choices of a call. Each choice's prompt goes to its worker by itself, and with this
many they fit what may wait for one worker (`max_unsent_bytes` of a link)."""

MAX_CHARS_PER_TOKEN: Final = 16
"""A text with more than this for each token of the context is refused unread. Texts have 1 to 6; tokenizing
takes a second for each million characters."""


@dataclass(slots=True)
class Plan:
    """Choices are numbered prompt by prompt: choice k of prompt p has index p * n + k."""

    prompt_lengths: list[int]  # tokens, per prompt
    requests: list[Request]
    answers: list[Answer]
    formats: list[LogprobFormat]  # per choice; empty when no log-probabilities are wanted


class Planner:
    """Makes plans. Holds what does not change from one call to the next."""

    def __init__(self, preprocessor: Preprocessor, settings: FrontendSettings, rng: random.Random) -> None:
        self._preprocessor = preprocessor
        self._settings = settings
        self._rng = rng

    async def plan(
        self, call_id: str, body: ChatRequest | CompletionRequest, view: ModelView, caller: Caller
    ) -> Plan:
        """Render, tokenize and check. Raises RequestRejected: INVALID naming the field; OVERLOADED when its
        prompts would have to wait too long for the tokenizer."""
        sampling = sampling_of(body, view, first_seed(body, self._rng))
        text = await self._preprocessor.text_of(view, caller)
        parser = _parser(body, text, view)
        prompts = await self._prompt_ids(body, text, view, caller)
        tokens = sum(map(len, prompts)) * (body.n or 1)
        if tokens > MAX_CALL_TOKENS:
            message = f"`n` times prompts come to {tokens} prompt tokens, more than {MAX_CALL_TOKENS}."
            raise RequestRejected(message, field="n")
        age_s = time.perf_counter() - caller.since
        plan = Plan([len(prompt) for prompt in prompts], [], [], [])
        for prompt in prompts:
            fitted = with_room(sampling, body, view, len(prompt), self._settings.default_max_tokens)
            if parser is not None:
                fitted = msgspec.structs.replace(fitted, structured=parser.structured(prompt))
            for choice in range(body.n or 1):
                index = len(plan.requests)
                own = fitted if choice == 0 else _reseeded(fitted, choice)
                plan.requests.append(
                    Request(
                        request_id=f"{call_id}-{index}",
                        model=view.card.name,
                        revision=view.revision,
                        token_ids=prompt,
                        sampling=own,
                        cache_salt=body.cache_salt or "",
                        priority=caller.priority,
                        tenant=caller.tenant,
                        call_id=call_id,
                        age_s=age_s,
                    )
                )
                plan.answers.append(_answer(index, body, text, view, prompt, parser))
                if own.logprobs is not None and not _hides_tokens(body, parser):
                    kind = ChatLogprobs if isinstance(body, ChatRequest) else CompletionLogprobs
                    plan.formats.append(kind(text.token_bytes, own.logprobs))
        return plan

    async def _prompt_ids(
        self, body: ChatRequest | CompletionRequest, text: ModelText, view: ModelView, caller: Caller
    ) -> list[list[int]]:
        if isinstance(body, ChatRequest):
            rendered = self._preprocessor.chat_prompt(text, body)
            _check_length(rendered, view)
            return await self._preprocessor.encode(
                text, [rendered], caller, add_special_tokens=bool(body.add_special_tokens)
            )
        texts = []
        for prompt in body.prompts:
            if isinstance(prompt, str):
                _check_length(prompt, view)
                texts.append(prompt)
            else:
                check_vocabulary("prompt", prompt, view.card.vocab_size)
        special = body.add_special_tokens is not False
        encoded = iter(await self._preprocessor.encode(text, texts, caller, add_special_tokens=special))
        prompts = [next(encoded) if isinstance(prompt, str) else prompt for prompt in body.prompts]
        if not all(prompts):
            raise RequestRejected("A prompt is empty.", field="prompt")
        return prompts


def priority_of(body: ChatRequest | CompletionRequest, tenant: str) -> int:
    """Where there are tenants, none of them may put itself before the others; after them it may."""
    priority = body.priority or 0
    return max(0, priority) if tenant else priority


def _check_length(prompt: str, view: ModelView) -> None:
    limit = view.card.max_model_len * MAX_CHARS_PER_TOKEN
    if len(prompt) > limit:
        raise too_long(
            view.card.max_model_len, f"your prompt has {len(prompt)} characters, more than {limit}"
        )


def _reseeded(sampling: Sampling, choice: int) -> Sampling:
    return msgspec.structs.replace(sampling, seed=choice_seed(sampling.seed, choice))


def _parser(body: ChatRequest | CompletionRequest, text: ModelText, view: ModelView) -> CallParser | None:
    """What takes this request's answers apart; None when they are plain text."""
    if not isinstance(body, ChatRequest):
        return None
    tool_parser = view.card.answering.tool_parser
    if body.calls_tools and (text.parser is None or not tool_parser):
        reason = "no parser for tool calls was named to its workers (--tool-call-parser)"
        if tool_parser:
            reason = f"this frontend has no vLLM, whose parser {tool_parser} that needs"
        message = f"`{view.card.name}` cannot call tools: {reason}."
        raise RequestRejected(message, code="unsupported_value", field="tools")
    return text.parser.begin(_set_fields(body)) if text.parser is not None else None


def _set_fields(body: ChatRequest) -> JsonObject:
    """What the client has set, as JSON."""
    given = {name: getattr(body, name) for name in body.__struct_fields__ if name != "messages"}
    fields = {name: value for name, value in given.items() if value is not None}
    shown: JsonObject = msgspec.to_builtins(fields, str_keys=True)
    return shown | {"messages": openai_messages(body.messages)}


def _hides_tokens(body: ChatRequest | CompletionRequest, parser: CallParser | None) -> bool:
    """Log-probabilities show tokens, also those of reasoning that was not to be shown."""
    return parser is not None and isinstance(body, ChatRequest) and body.include_reasoning is False


def _answer(
    index: int,
    body: ChatRequest | CompletionRequest,
    text: ModelText,
    view: ModelView,
    prompt: list[int],
    parser: CallParser | None,
) -> Answer:
    special = body.skip_special_tokens is False
    reply = None
    if parser is not None and isinstance(body, ChatRequest):
        reply = Reply(parser.answer(prompt), body)
        special = not parser.skip_special_tokens
    return Answer(
        index,
        text.detokenizer(prompt, special=special),
        stops=StopMatcher(body.stops, bool(body.include_stop_str_in_output)) if body.stops else None,
        min_tokens=body.min_tokens or 0,
        stop_tokens=frozenset((*view.card.eos_token_ids, *(body.stop_token_ids or ()))),
        eos_tokens=view.card.eos_token_ids,
        reply=reply,
    )
