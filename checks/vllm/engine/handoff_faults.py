"""Prefill engines that die, freeze or come back, and reads that end too late: the text is right anyway.

KV moves by TCP here, which needs both sides' help, as between machines: a frozen engine cannot be read.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager

import pytest
import pytest_asyncio

from checks.vllm.engine.pair import (
    GREEDY,
    blocks_of,
    computed,
    decoding,
    idle,
    prefilled,
    prompt_of,
    through_both,
)
from checks.vllm.engine.running import Running, running, settings
from penstock.engines.vllm.handoff_params import lease_s
from penstock.shapes import Attempt, Handoff, Output, Role
from tests.ports import free_port
from tests.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

TTL_S = 8.0  # what is pulled at once is pulled within this, also on a busy machine
LEASE_S = lease_s(TTL_S)
SMALL_CACHE = 3 << 20  # 48 blocks
SECONDS = 60.0


@pytest.fixture(scope="module", autouse=True)
def _by_tcp() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UCX_TLS", "tcp,self")
        patch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", str(PORT))
        yield


PORT = free_port()
"""Where the prefill engines of this file are found, one after the other."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def decode() -> AsyncIterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", str(free_port()))
        own = running(settings(Role.DECODE, "d0"))
        engine = await own.__aenter__()
    yield engine
    await own.__aexit__(None, None, None)


def prefill_engine(epoch: int, ttl_s: float = 30.0) -> AbstractAsyncContextManager[Running]:
    small = {"kv_cache_bytes": SMALL_CACHE, "max_model_len": 1024}
    return running(settings(Role.PREFILL, "p0", epoch=epoch, handoff_ttl_s=ttl_s, **small))


@contextmanager
def frozen(engine: Running) -> Iterator[None]:
    os.kill(engine.core_pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(engine.core_pid, signal.SIGCONT)


async def until_killed(engine: Running) -> None:
    os.kill(engine.core_pid, signal.SIGKILL)
    await until(lambda: engine.engine._failed, within_s=SECONDS)


async def decoded(
    decode: Running, name: str, prompt: list[int], first: Output, handoff: Handoff, seconds: float
) -> tuple[list[int], int | None, float]:
    """All tokens, the blocks pulled, and the time that it took."""
    start = time.monotonic()
    decode.submit(decoding(name, prompt, first, handoff, salt=name))
    rest = await asyncio.wait_for(decode.ended(name), seconds)
    return first.token_ids + rest.token_ids, rest.transferred_blocks, time.monotonic() - start


def overwrite(prefill: Running, name: str) -> list[str]:
    """Ask for so many other prompts that every free block is used for something else."""
    names = [f"{name}-{i}" for i in range(8)]
    for i, each in enumerate(names):
        prompt = prompt_of(400, seed=1000 + i)
        prefill.submit(Attempt(each, each, prompt, len(prompt), GREEDY, cache_salt=each))
    return names


async def test_prefill_engines_that_die_and_come_back_under_the_same_port(decode: Running) -> None:
    prompt = prompt_of(100, seed=1)
    alone = (await computed(decode, "death", prompt)).token_ids

    async with prefill_engine(1) as first_life:
        never_met = await prefilled(first_life, "never-met", prompt, salt="never-met")
        await until_killed(first_life)
    tokens, blocks, _ = await decoded(decode, "never-met", prompt, *never_met, seconds=SECONDS)
    assert (tokens, blocks) == (alone, 0)

    async with prefill_engine(2) as second_life:
        # Pulled whole before the death: nothing is missed.
        pulled = await through_both(second_life, decode, "before", prompt, salt="before")
        assert (pulled.token_ids, pulled.transferred_blocks) == (alone, 4)
        met = await prefilled(second_life, "met", prompt, salt="met")
        dying = await prefilled(second_life, "dying", prompt, salt="dying")
        # Its last moment is while it is read.
        os.kill(second_life.core_pid, signal.SIGSTOP)
        reading = asyncio.create_task(decoded(decode, "dying", prompt, *dying, seconds=SECONDS))
        await asyncio.sleep(0.5)
        await until_killed(second_life)
        tokens, blocks, _ = await reading
        assert (tokens, blocks) == (alone, 0)
    tokens, blocks, _ = await decoded(decode, "met", prompt, *met, seconds=SECONDS)
    assert (tokens, blocks) == (alone, 0)

    async with prefill_engine(3) as third_life:
        again = await through_both(third_life, decode, "again", prompt, salt="again")
        assert (again.token_ids, again.transferred_blocks) == (alone, 4)
    await until(lambda: idle(decode), within_s=SECONDS)


async def test_reads_that_come_or_end_too_late(decode: Running) -> None:
    async with prefill_engine(4, TTL_S) as prefill:
        await until(lambda: prefill.card.total_blocks == 48)
        prompt = prompt_of(200, seed=2)
        alone = (await computed(decode, "late", prompt)).token_ids
        met = await through_both(prefill, decode, "meet", prompt, salt="meet")
        assert (met.token_ids, met.transferred_blocks) == (alone, blocks_of(200))

        await _refused_when_expired(prefill, decode, prompt, alone)
        await _frozen_reader(prefill, decode, prompt, alone)
        await _frozen_holder(prefill, decode, prompt, alone)

        after = await through_both(prefill, decode, "after", prompt, salt="after")
        assert (after.token_ids, after.transferred_blocks) == (alone, blocks_of(200))
        for engine in (prefill, decode):
            await until(lambda engine=engine: idle(engine), within_s=SECONDS)


async def _refused_when_expired(
    prefill: Running, decode: Running, prompt: list[int], alone: list[int]
) -> None:
    first, handoff = await prefilled(prefill, "expired", prompt, salt="expired")
    assert 0 < handoff.ttl_s <= TTL_S
    await until(lambda: idle(prefill), within_s=LEASE_S + SECONDS)
    for name in overwrite(prefill, "expired-over"):
        await prefill.ended(name)
    tokens, blocks, _ = await decoded(decode, "expired", prompt, first, handoff, seconds=SECONDS)
    assert (tokens, blocks) == (alone, 0)


async def _frozen_reader(prefill: Running, decode: Running, prompt: list[int], alone: list[int]) -> None:
    """The decode engine wakes when the blocks are somebody else's."""
    first, handoff = await prefilled(prefill, "reader", prompt, salt="reader")
    with frozen(decode):
        reading = asyncio.create_task(
            decoded(decode, "reader", prompt, first, handoff, seconds=LEASE_S + 2 * SECONDS)
        )
        await until(lambda: idle(prefill), within_s=LEASE_S + SECONDS)
        for name in overwrite(prefill, "reader-over"):
            await prefill.ended(name)
    tokens, blocks, _ = await reading
    assert (tokens, blocks) == (alone, 0)


async def _frozen_holder(prefill: Running, decode: Running, prompt: list[int], alone: list[int]) -> None:
    """The prefill engine stands still while it is read, and gives its blocks to others as it wakes."""
    first, handoff = await prefilled(prefill, "holder", prompt, salt="holder")
    with frozen(prefill):
        reading = asyncio.create_task(
            decoded(decode, "holder", prompt, first, handoff, seconds=LEASE_S + 2 * SECONDS)
        )
        names = overwrite(prefill, "holder-over")
        await asyncio.sleep(LEASE_S + 1.0)
        assert not reading.done()  # so it reads late
    tokens, blocks, _ = await reading
    assert (tokens, blocks) == (alone, 0)
    for name in names:
        await prefill.ended(name)
