"""Which vLLM engines read each other's KV: what vLLM itself would refuse, frontends know beforehand."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest_asyncio

from checks.vllm.engine.pair import computed, decoding, prefilled, prompt_of
from checks.vllm.engine.running import MODEL, Running, running, settings
from penstock.core.pairing import kv_format
from penstock.shapes import Role


@pytest_asyncio.fixture
async def prefill() -> AsyncIterator[Running]:
    async with running(settings(Role.PREFILL, "p0")) as prefill:
        yield prefill


async def test_a_model_under_another_path_is_another_format(prefill: Running, tmp_path: Path) -> None:
    """vLLM compares paths, among other things, when one engine first speaks to another."""
    (tmp_path / "other").symlink_to(MODEL)
    own = settings(Role.DECODE, "d0", model=str(tmp_path / "other"), served_name=prefill.card.model.name)
    prompt = prompt_of(100)
    async with running(own) as decode:
        assert decode.card.model.weights == prefill.card.model.weights
        assert kv_format(decode.card) != kv_format(prefill.card)
        alone = await computed(decode, "r", prompt)
        first, handoff = await prefilled(prefill, "r", prompt)
        as_if_it_fitted = msgspec.structs.replace(handoff, layout=decode.card.layout)
        decode.submit(decoding("r-d", prompt, first, as_if_it_fitted))
        rest = await decode.ended("r-d")
        assert first.token_ids + rest.token_ids == alone.token_ids
        assert rest.transferred_blocks == 0
        prefill.engine.release("r", sent=False)
