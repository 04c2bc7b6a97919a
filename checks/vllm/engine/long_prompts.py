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
    # Loads are reported at once: steps of this model are shorter than what reports are spaced by otherwise.
    async with running(settings(max_batch_tokens=STEP, load_interval_s=0.0, events_delay_s=0.0)) as engine:
        in_steps = reached(await engine.ask("in steps", PROMPT, sampling), FinishReason.LENGTH)
        left = {step.load.prefill_tokens for _, step in engine.log.steps}
        at_once = reached(await engine.ask("at once", PROMPT, sampling), FinishReason.LENGTH)
    assert in_steps.cached_tokens == 0
    assert at_once.cached_tokens == 288
    assert at_once.token_ids == in_steps.token_ids
    assert left & {len(PROMPT) - STEP, len(PROMPT) - 2 * STEP}  # computed steps are not in its queue
