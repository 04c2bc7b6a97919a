"""The mirror of a real vLLM's cache, kept by its KV events, against what vLLM itself finds cached."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from checks.vllm.engine.pair import GREEDY, prompt_of
from checks.vllm.engine.running import Running, running, settings
from penstock.shapes import Sampling
from tests.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

BLOCKS = 48
ANSWER = Sampling(max_tokens=30, temperature=0.0, ignore_eos=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def small() -> AsyncIterator[Running]:
    async with running(settings(kv_cache_bytes=BLOCKS << 16, max_model_len=1024)) as engine:
        assert engine.card.total_blocks == BLOCKS
        yield engine


def foreseen(engine: Running, prompt: list[int], salt: str = "") -> int:
    return engine.engine._prompts.cached_tokens(prompt, salt)


async def settled(small: Running, marker: int) -> None:
    """Until all events so far have come, which is a little after the outputs of their step: events come in
    order, and here one block more is made, another one for each `marker`, whose event is the last."""
    last = prompt_of(33, seed=10_000 + marker)
    await small.ask(f"marker-{marker}", last, Sampling(max_tokens=1, temperature=0.0))
    await until(lambda: foreseen(small, last) == 32)


async def test_what_is_foreseen_is_what_vllm_finds(small: Running) -> None:
    """Six conversations, whose turns come in any order, in a cache that has room for about three."""
    chance = random.Random(7)
    talks = [prompt_of(60, seed=i) for i in range(6)]
    expected = found = 0
    for turn in range(50):
        which = chance.randrange(len(talks))
        prompt = talks[which]
        predicted = foreseen(small, prompt)
        output = await small.ask(f"turn-{turn}", prompt, ANSWER)
        assert output.cached_tokens is not None
        expected += predicted
        found += output.cached_tokens
        talks[which] = prompt + output.token_ids + prompt_of(25, seed=turn)
        if len(talks[which]) > 600:
            talks[which] = prompt_of(60, seed=100 + turn)
        await settled(small, turn)
        assert len(small.engine.cached_hashes()) <= BLOCKS
    assert found > 3000  # it was worth it
    assert abs(expected - found) <= 0.02 * found
    removed = sum(len(step.removed) for _, step in small.log.steps)
    assert removed > BLOCKS  # and there were evictions


async def test_the_same_under_load(small: Running) -> None:
    """Eight at once: what is foreseen is as old as the last step."""
    expected = found = 0
    for turn in range(6):
        prompts = [prompt_of(64, seed=i % 3) + prompt_of(20, seed=50 + i + 8 * turn) for i in range(8)]
        predicted = [foreseen(small, prompt) for prompt in prompts]
        outputs = await asyncio.gather(
            *[small.ask(f"load-{turn}-{i}", prompt, GREEDY) for i, prompt in enumerate(prompts)]
        )
        await settled(small, 100 + turn)
        if turn:
            expected += sum(predicted)
            found += sum(output.cached_tokens or 0 for output in outputs)
    assert found == 5 * 8 * 64
    assert abs(expected - found) <= 0.02 * found


async def test_salts_do_not_meet(small: Running) -> None:
    prompt = prompt_of(100, seed=900)
    await small.ask("salted", prompt, GREEDY, cache_salt="a")
    await until(lambda: foreseen(small, prompt, "a") == 96)
    assert foreseen(small, prompt, "b") == foreseen(small, prompt) == 0
    assert (await small.ask("salted-again", prompt, GREEDY, cache_salt="a")).cached_tokens == 96


async def test_a_reset_empties_it(small: Running) -> None:
    """With vLLM's next step, which is when it publishes."""
    assert small.engine._core is not None
    assert small.engine.cached_hashes()
    assert await small.engine._core.client.reset_prefix_cache_async()
    await small.ask("short", prompt_of(5), Sampling(max_tokens=1))
    await until(lambda: not small.engine.cached_hashes())
