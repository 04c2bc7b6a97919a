"""A prefill and a decode engine of one model, and requests that go through both."""

from __future__ import annotations

import random

from checks.vllm.engine.running import Running, reached
from penstock.shapes import Attempt, FinishReason, Handoff, Output, Sampling

BLOCK_SIZE = 32
GREEDY = Sampling(max_tokens=16, temperature=0.0, ignore_eos=True)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """Tokens such that other KV would give other text."""
    chance = random.Random(f"{length} {seed}")
    return [chance.randrange(5, 1000) for _ in range(length)]


def blocks_of(length: int) -> int:
    return -(-length // BLOCK_SIZE)


async def prefilled(
    prefill: Running, name: str, prompt: list[int], sampling: Sampling = GREEDY, salt: str = ""
) -> tuple[Output, Handoff]:
    """The first token, and the right to pull the prompt's KV."""
    output = await prefill.ask(name, prompt, sampling, prefill_only=True, cache_salt=salt)
    reached(output, FinishReason.PREFILLED)
    assert len(output.token_ids) == 1
    assert output.handoff is not None
    return output, output.handoff


def decoding(
    name: str,
    prompt: list[int],
    first: Output,
    handoff: Handoff,
    sampling: Sampling = GREEDY,
    salt: str = "",
) -> Attempt:
    """What goes to the decode engine after that."""
    return Attempt(
        name,
        name,
        prompt + first.token_ids,
        len(prompt),
        sampling,
        handoff=handoff,
        cache_salt=salt,
    )


async def through_both(
    prefill: Running,
    decode: Running,
    name: str,
    prompt: list[int],
    sampling: Sampling = GREEDY,
    salt: str = "",
) -> Output:
    """The decode engine's output, with the prefill engine's token before it."""
    first, handoff = await prefilled(prefill, f"{name}-p", prompt, sampling, salt)
    decode.submit(decoding(f"{name}-d", prompt, first, handoff, sampling, salt))
    rest = await decode.ended(f"{name}-d")
    rest.token_ids = first.token_ids + rest.token_ids
    rest.logprobs = [*(first.logprobs or ()), *(rest.logprobs or ())] or None
    return rest


async def computed(decode: Running, name: str, prompt: list[int], sampling: Sampling = GREEDY) -> Output:
    """The same by one engine alone, which has nothing of it in its cache."""
    return await decode.ask(f"{name}-alone", prompt, sampling, cache_salt=f"{name}-alone")


def idle(engine: Running) -> bool:
    """Nothing runs, and no block is in use."""
    load = engine.log.steps[-1][1].load
    return (load.used_blocks, load.running, load.waiting, load.held_handoffs) == (0, 0, 0, 0)
