"""Prefill engines of several ranks: every rank's KV is handed over, let go of, and known to be cached."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from checks.vllm.engine.pair import GREEDY, computed, idle, prefilled, prompt_of, through_both
from checks.vllm.engine.running import ENGINE_ARGS, Running, reached, running, settings
from penstock.shapes import FinishReason, Role
from tests.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

SECONDS = 60.0
RANKS = {
    "data parallel": (*ENGINE_ARGS, "--data-parallel-size", "2"),
    "tensor parallel": (
        *ENGINE_ARGS,
        "--distributed-executor-backend",
        "mp",
        "--tensor-parallel-size",
        "2",
    ),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def decode() -> AsyncIterator[Running]:
    async with running(settings(Role.DECODE, "d0")) as engine:
        yield engine


@pytest.mark.parametrize("kind", RANKS)
async def test_several_ranks_are_one_engine(decode: Running, kind: str) -> None:
    prompts = [prompt_of(100, seed=i) for i in range(6)]
    alone = [(await computed(decode, f"{kind}-{i}", prompt)).token_ids for i, prompt in enumerate(prompts)]
    async with running(settings(Role.PREFILL, "p0", engine_args=RANKS[kind])) as prefill:
        await asyncio.gather(
            *[prefilled(prefill, f"unsent-{i}", prompt) for i, prompt in enumerate(prompts)]
        )
        await until(lambda: prefill.log.steps[-1][1].load.used_blocks == 6 * 4)
        await until(lambda: prefill.log.steps[-1][1].load.held_handoffs == 6)
        await until(lambda: len(prefill.engine.cached_hashes()) == 6 * 3)
        for i in range(6):
            prefill.engine.release(f"unsent-{i}", sent=False)
        await until(lambda: idle(prefill), within_s=SECONDS)

        both = await asyncio.gather(
            *[
                through_both(prefill, decode, f"{kind}-{i}", prompt, salt=f"{kind}-{i}")
                for i, prompt in enumerate(prompts)
            ]
        )
        assert [output.token_ids for output in both] == alone
        assert [output.transferred_blocks for output in both] == [4] * 6
        for engine in (prefill, decode):
            await until(lambda engine=engine: idle(engine), within_s=SECONDS)

        cut = await prefill.ask("whole", prompts[0], GREEDY)
        assert reached(cut, FinishReason.LENGTH).token_ids == alone[0]
