"""How an attempt becomes a request to vLLM, which knows prompts but not outputs begun elsewhere.

Tokens that earlier attempts gave can be brought back in two ways:

    folded    they become part of the prompt: one prefill, mostly cached. Right for whatever depends only
              on the tokens before it: greedy tokens, and samples whose draws nobody asked to repeat.
    replayed  vLLM generates them again, held to the very same tokens (forced.py). It takes a decode step
              for each, but penalties, min_tokens, a grammar's state and a seed's draws go on as if nothing
              had happened.

The token that a prefill worker gave is always replayed: the KV that was handed over ends before it. So a
decode worker never contradicts what the client has read already, and a prompt that ends with a block needs
no block that the prefill worker does not have.
"""

from __future__ import annotations

import msgspec
from xxhash import xxh3_64_intdigest

from penstock.shapes import Attempt, Sampling

_SEED_MASK = (1 << 63) - 1  # torch takes an int64


class Continuation(msgspec.Struct, frozen=True):
    """What vLLM is asked for, in place of an attempt."""

    prompt: list[int]
    replay: list[int]  # the first tokens of its output, known already and to be dropped
    sampling: Sampling  # counted from the end of `prompt`


def continuation(attempt: Attempt, *, pulls: bool) -> Continuation:
    """`pulls`: the attempt's handoff will be used, so the prompt must not be longer than its KV."""
    token_ids, prompt_len = attempt.token_ids, attempt.prompt_len
    if len(token_ids) == prompt_len or _depends_on_history(attempt.sampling):
        end = prompt_len
    elif pulls and attempt.handoff is not None:
        end = max(prompt_len, min(attempt.handoff.num_tokens, len(token_ids)))
    else:
        end = len(token_ids)
    return Continuation(token_ids[:end], token_ids[end:], _from(attempt, end))


def folded(attempt: Attempt) -> Continuation:
    """With everything that is known in the prompt, whatever the sampling depends on."""
    end = len(attempt.token_ids)
    return Continuation(attempt.token_ids, [], _from(attempt, end))


def _depends_on_history(sampling: Sampling) -> bool:
    """Whether the next token depends on more than the tokens before it. Repetition penalties do not: they
    count prompts too."""
    return (
        sampling.structured is not None
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
        or any(len(word) > 1 for word in sampling.bad_words)
        or (sampling.reproducible and sampling.temperature > 0.0)
    )


def _from(attempt: Attempt, end: int) -> Sampling:
    """The attempt's sampling, with limits counted from `end`; one token more when all that it gives is the
    first after what is known."""
    sampling, folded = attempt.sampling, end - attempt.prompt_len
    max_tokens = sampling.max_tokens - folded
    if attempt.prefill_only:
        max_tokens = min(max_tokens, len(attempt.token_ids) - end + 1)
    # Where there is output, they came with its first token.
    wants_prompt = len(attempt.token_ids) == attempt.prompt_len
    return msgspec.structs.replace(
        sampling,
        prompt_logprobs=sampling.prompt_logprobs if wants_prompt else None,
        max_tokens=max_tokens,
        min_tokens=min(max(0, sampling.min_tokens - folded), max_tokens),
        seed=_seed(sampling.seed, folded),
    )


def _seed(seed: int, folded: int) -> int:
    """Another seed for each place at which a sample is taken up: the same one would repeat its draws."""
    if folded == 0:
        return seed & _SEED_MASK
    return xxh3_64_intdigest(folded.to_bytes(8, "little"), seed & _SEED_MASK) & _SEED_MASK
