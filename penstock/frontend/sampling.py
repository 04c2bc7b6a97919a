"""From what a client asked for to what an engine is told."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TypeVar

import msgspec

from penstock.errors import RequestRejected
from penstock.frontend.openai import GenerationRequest
from penstock.frontend.structured import constraint
from penstock.shapes import ModelView, Sampling, StructuredOutput

_SEED_BITS = 63  # what every engine takes for a seed: a non-negative int64
_SEED_MASK = (1 << _SEED_BITS) - 1

_T = TypeVar("_T")


def sampling_of(request: GenerationRequest, model: ModelView, seed: int) -> Sampling:
    """The request's sampling, the same for all its choices but for `seed` and `max_tokens`.

    What the client left out comes from the model's generation_config.json, then from OpenAI's defaults.
    Raises RequestRejected for token ids outside the vocabulary, and for a form of the output that
    its engine cannot hold it to.
    """
    bias = request.logit_bias or {}
    _check_tokens("logit_bias", bias, model)
    stop_token_ids = tuple(request.stop_token_ids or ())
    _check_tokens("stop_token_ids", stop_token_ids, model)
    default = model.card.answering.sampling_defaults.get
    return Sampling(
        max_tokens=0,
        min_tokens=request.min_tokens or 0,
        temperature=_first(request.temperature, default("temperature"), 1.0),
        top_p=_first(request.top_p, default("top_p"), 1.0),
        top_k=max(0, int(_first(request.top_k, default("top_k"), 0))),  # -1, too, means off
        min_p=_first(request.min_p, default("min_p"), 0.0),
        seed=seed,
        presence_penalty=_first(request.presence_penalty, default("presence_penalty"), 0.0),
        frequency_penalty=_first(request.frequency_penalty, default("frequency_penalty"), 0.0),
        repetition_penalty=_first(request.repetition_penalty, default("repetition_penalty"), 1.0),
        logit_bias=bias,
        stop_token_ids=stop_token_ids,
        ignore_eos=bool(request.ignore_eos),
        logprobs=request.wanted_logprobs,
        structured=_structured(request, model),
        reproducible=request.seed is not None,
    )


def _structured(request: GenerationRequest, model: ModelView) -> StructuredOutput | None:
    wanted = constraint(request.response_format, request.structured_outputs)
    if wanted is not None and not model.card.answering.structured_output:
        field = "response_format" if request.response_format is not None else "structured_outputs"
        raise RequestRejected(
            f"`{field}`: the engine that serves `{model.card.name}` cannot hold its output to a form.",
            code="unsupported_value",
            field=field,
        )
    return wanted


def with_room(
    sampling: Sampling,
    request: GenerationRequest,
    model: ModelView,
    prompt_tokens: int,
    default_max_tokens: int,
) -> Sampling:
    """The sampling with `max_tokens` for a prompt of this length: what the client wants, or what is left of
    the context where that is less, as in vLLM. Only the prompt must fit.

    Raises RequestRejected: code "context_length_exceeded" when the prompt leaves no room for a token;
    naming the field when the context could never hold what is wanted.
    """
    limit, wanted = model.card.max_model_len, request.wanted_max_tokens
    if wanted is not None and wanted > limit:
        field = request.max_tokens_field
        message = f"`{field}` is {wanted}, more than the model's whole context of {limit} tokens."
        raise RequestRejected(message, field=field)
    if prompt_tokens >= limit:
        raise too_long(limit, f"your prompt has {prompt_tokens} tokens, and at least 1 must be generated")
    max_tokens = min(wanted if wanted is not None else default_max_tokens, limit - prompt_tokens)
    if sampling.min_tokens > max_tokens:
        raise RequestRejected(f"`min_tokens` is above the {max_tokens} tokens allowed.", field="min_tokens")
    return msgspec.structs.replace(sampling, max_tokens=max_tokens)


def first_seed(request: GenerationRequest, rng: random.Random) -> int:
    """The seed of choice 0: the client's, or a random one, so that every attempt draws the same tokens."""
    return request.seed & _SEED_MASK if request.seed is not None else rng.getrandbits(_SEED_BITS)


def choice_seed(seed: int, choice: int) -> int:
    """The seed of choice k of n, from the first one's: as in vLLM, so that a client that moves here gets
    the same answers."""
    return (seed + choice) & _SEED_MASK


def _first(*values: _T | None) -> _T:
    return next(value for value in values if value is not None)


def _check_tokens(field: str, token_ids: Iterable[int], model: ModelView) -> None:
    check_vocabulary(field, token_ids, model.card.vocab_size)


def check_vocabulary(field: str, token_ids: Iterable[int], vocab_size: int) -> None:
    """Raises RequestRejected when a token id is outside of the vocabulary."""
    largest = max(token_ids, default=0)
    if largest >= vocab_size:
        raise RequestRejected(
            f"`{field}`: token id {largest} is outside the vocabulary of {vocab_size}.", field=field
        )


def too_long(limit: int, however: str) -> RequestRejected:
    """The refusal of what does not fit into a model's context of `limit` tokens."""
    message = f"This model's maximum context length is {limit} tokens. However, {however}."
    return RequestRejected(message, code="context_length_exceeded", field=None)
