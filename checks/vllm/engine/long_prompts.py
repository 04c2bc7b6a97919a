"""Prompts that take more than one step."""

from __future__ import annotations

import msgspec
import pytest

from checks.vllm.engine.running import reached, running, settings
from penstock.shapes import FinishReason, Sampling

PROMPT = [300 + number * 7919 % 600 for number in range(300)]
STEP = 128  # tokens
SEEDED = Sampling(max_tokens=16, seed=5, reproducible=True, ignore_eos=True)


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "seeded"])
async def test_steps_make_no_difference(temperature: float) -> None:
    """In three steps, and again in one, when most of it is cached."""
    sampling = msgspec.structs.replace(SEEDED, temperature=temperature)
    async with running(settings(max_batch_tokens=STEP)) as engine:
        in_steps = reached(await engine.ask("in steps", PROMPT, sampling), FinishReason.LENGTH)
        at_once = reached(await engine.ask("at once", PROMPT, sampling), FinishReason.LENGTH)
    assert in_steps.cached_tokens == 0
    assert at_once.cached_tokens == 288
    assert at_once.token_ids == in_steps.token_ids
