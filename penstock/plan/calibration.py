"""What is sent to a worker to learn what its steps cost, and the cost model that comes of it.

The worker measures itself: its rates, which frontends show in /health, are a fit of five terms to the times
of its steps (engines/step_times.py). They know nothing of the network and the frontend, and steps count
right however a prompt was divided. What a rate says depends on what the worker has done: so prompts are
sent first, alone and of many lengths, and then batches that decode, small and large, with short and long
contexts. The prompts' terms are taken after the former, the terms of decoding after the latter. The fit has
one constant for both kinds of steps, and after many steps of one kind it is that kind's.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from statistics import median
from typing import NamedTuple

from penstock.engines.cost_models import CostModel
from penstock.shapes import Rates

PROMPT_TOKENS = (64, 256, 1024, 2048, 4096, 8192, 16384, 32768)
PROMPTS_EACH = 8
"""Lengths of the prompts that are sent alone, and how many of each."""

OUTPUT_TOKENS = 64
ROUNDS = 2
"""Tokens of each answer of a batch; how often all batches are sent."""


class Burst(NamedTuple):
    """Requests that are sent together."""

    requests: int
    prompt_tokens: int


BURSTS = (Burst(1, 64), Burst(64, 64), Burst(32, 4096), Burst(1, 8192), Burst(16, 64), Burst(64, 1024))


class Measured(NamedTuple):
    """What a client saw of requests that were sent together."""

    requests: int
    prompt_tokens: float  # of each, with the chat template
    ttft_ms: float  # medians
    itl_ms: float


def prompt_lengths(max_tokens: int, seed: int) -> list[int]:
    """The lengths of prompts to send alone, in a random order."""
    lengths = [tokens for tokens in PROMPT_TOKENS if tokens <= max_tokens] * PROMPTS_EACH
    Random(seed).shuffle(lengths)
    return lengths


def bursts(max_tokens: int, cache_tokens: int) -> list[Burst]:
    """The batches to send, in turn: those that fit."""
    fitting = [
        burst
        for burst in BURSTS
        if burst.prompt_tokens + OUTPUT_TOKENS <= max_tokens
        and burst.requests * (burst.prompt_tokens + OUTPUT_TOKENS) <= cache_tokens
    ]
    return fitting * ROUNDS


def costs_of(after_prompts: Rates, after_decoding: Rates) -> CostModel:
    """The cost model of a worker with these rates."""
    return CostModel(
        c0=after_prompts.step_ms,
        c1=after_prompts.prefill_token_ms,
        c2=after_prompts.prefill_context_ms,
        a0=after_decoding.step_ms,
        a1=after_decoding.decode_request_ms,
        a2=after_decoding.decode_context_ms,
    )


def ttft_error(costs: CostModel, prompts: Sequence[Measured], max_batch_tokens: int) -> float:
    """The median of |predicted / measured - 1| over prompts that were alone and fit into one step."""
    errors = []
    for it in prompts:
        if it.prompt_tokens <= max_batch_tokens:
            tokens = it.prompt_tokens
            predicted_ms = costs.c0 + costs.c1 * tokens + costs.c2 * tokens * tokens / 2
            errors.append(abs(predicted_ms / it.ttft_ms - 1))
    return median(errors)


def itl_error(costs: CostModel, batches: Sequence[Measured]) -> float:
    """The same of the time per token of batches."""
    errors = []
    for it in batches:
        context_tokens = it.requests * (it.prompt_tokens + OUTPUT_TOKENS / 2)
        predicted_ms = costs.a0 + costs.a1 * it.requests + costs.a2 * context_tokens
        errors.append(abs(predicted_ms / it.itl_ms - 1))
    return median(errors)
