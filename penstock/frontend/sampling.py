"""From what a call asks for to what an engine is told."""

from __future__ import annotations

import random
from collections.abc import Iterable

import msgspec

from penstock.core.events import REJECTED_BY_ENGINE
from penstock.errors import RequestRejected
from penstock.frontend.wanted import Wanted
from penstock.shapes import ModelCard, Sampling

_SEED_BITS = 63  # what every engine takes for a seed: a non-negative int64
_SEED_MASK = (1 << _SEED_BITS) - 1


def sampling_of(wanted: Wanted, model: ModelCard, rng: random.Random) -> Sampling:
    """The call's sampling, the same for all its choices but for `seed` and `max_tokens`.

    What the client left out comes from the model's generation_config.json, then from the API's defaults. A
    seed is drawn here, so that every attempt draws the same tokens.
    Raises RequestRejected for token ids outside the vocabulary, and for a form of the output that
    its engine cannot hold it to.
    """
    sampling = wanted.sampling
    check_vocabulary("logit_bias", sampling.logit_bias, model.vocab_size)
    check_vocabulary("stop_token_ids", sampling.stop_token_ids, model.vocab_size)
    check_vocabulary("allowed_token_ids", sampling.allowed_token_ids, model.vocab_size)
    check_vocabulary("logprob_token_ids", sampling.logprob_token_ids, model.vocab_size)
    if sampling.structured is not None and not model.answering.structured_output:
        field = wanted.structured_field
        raise RequestRejected(
            f"`{field}`: the engine that serves `{model.name}` does not support structured output.",
            code="unsupported_value",
            field=field,
        )
    if sampling.thinking_budget is not None and not model.answering.thinking_budget:
        if wanted.needs_reasoning:
            raise RequestRejected(
                f"`thinking_token_budget`: the workers of `{model.name}` do not know what ends its"
                " reasoning (--reasoning-parser).",
                code="unsupported_value",
                field="thinking_token_budget",
            )
        sampling = msgspec.structs.replace(sampling, thinking_budget=None)
    defaults = model.answering.sampling_defaults
    changes = {name: value for name in wanted.left_out if (value := getattr(defaults, name)) is not None}
    if not sampling.reproducible:
        changes["seed"] = rng.getrandbits(_SEED_BITS)
    return msgspec.structs.replace(sampling, **changes)


def name_field(error: RequestRejected, wanted: Wanted, told: Sampling) -> None:
    """Have an engine's refusal name the client's field. An engine refuses what it cannot hold an answer to:
    it was `told` a schema or grammar, the client's own or one that was made of the tools to call. A message
    that begins with a name in backquotes names its field already."""
    if error.code != REJECTED_BY_ENGINE:
        return
    if error.message.startswith("`"):
        error.field = error.message[1:].partition("`")[0]
    elif told.structured is not None:
        error.field = wanted.structured_field if wanted.sampling.structured is not None else "tools"
        error.message = f"`{error.field}`: {error.message}"
        error.args = (error.message,)


def bad_word_texts(words: Iterable[str]) -> list[str]:
    """What to tokenize for `bad_sequences`: each word as it begins a text, and as it follows others."""
    return [text for word in dict.fromkeys(words) for text in (word.lstrip(), " " + word.lstrip())]


def bad_sequences(encoded: list[list[int]]) -> tuple[tuple[int, ...], ...]:
    """The sequences of tokens to hold back, from the tokens of `bad_word_texts`. As in vLLM, the form with
    a space counts where that makes another first token and no more of them.

    Raises RequestRejected for a word that has no tokens.
    """
    found: list[tuple[int, ...]] = []
    for first, later in zip(encoded[::2], encoded[1::2], strict=True):
        if not first:
            raise RequestRejected("`bad_words`: one of them has no tokens.", field="bad_words")
        found.append(tuple(first))
        if len(later) == len(first) and later[0] != first[0]:
            found.append(tuple(later))
    return tuple(found)


def with_room(
    sampling: Sampling, wanted: Wanted, model: ModelCard, prompt_tokens: int, default_max_tokens: int
) -> Sampling:
    """The sampling with `max_tokens` for a prompt of this length: what the client wants, or what is left of
    the context where that is less, as in vLLM. Only the prompt must fit.

    Raises RequestRejected: code "context_length_exceeded" when the prompt leaves no room for a token;
    naming the field when the context could never hold what is wanted.
    """
    limit, most = model.max_model_len, wanted.max_tokens
    if most is not None and most > limit and not wanted.any_max_tokens:
        field = wanted.max_tokens_field
        message = f"`{field}` is {most}, more than the model's whole context of {limit} tokens."
        raise RequestRejected(message, field=field)
    if prompt_tokens >= limit:
        raise too_long(limit, f"your prompt has {prompt_tokens} tokens, and at least 1 must be generated")
    # An engine gives one token at least, which a call that wants none does not show.
    max_tokens = min(max(1, most) if most is not None else default_max_tokens, limit - prompt_tokens)
    if sampling.min_tokens > max_tokens:
        raise RequestRejected(f"`min_tokens` is above the {max_tokens} tokens allowed.", field="min_tokens")
    return msgspec.structs.replace(sampling, max_tokens=max_tokens)


def client_seed(seed: int | None) -> int:
    """The seed of a call's first choice, from the client's."""
    return seed & _SEED_MASK if seed is not None else 0


def choice_seed(seed: int, choice: int) -> int:
    """The seed of choice k of n, from the first one's: as in vLLM, so that a client that moves here gets
    the same answers."""
    return (seed + choice) & _SEED_MASK


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
