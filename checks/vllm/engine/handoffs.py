"""KV handed from one real vLLM to another by NIXL: the text is the same, and nothing stays behind."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
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
from checks.vllm.engine.running import Running, reached, running, settings
from penstock.shapes import Attempt, FinishReason, Handoff, Incarnation, Role, Sampling, StructuredOutput
from tests.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

Pair = tuple[Running, Running]

KINDS = {
    "greedy": GREEDY,
    "seeded": Sampling(max_tokens=16, seed=5, reproducible=True, ignore_eos=True),
    "penalties": msgspec.structs.replace(GREEDY, presence_penalty=1.5, frequency_penalty=0.5),
    "regex": msgspec.structs.replace(GREEDY, structured=StructuredOutput("regex", "[a-z ]{30,40}")),
    "logprobs": msgspec.structs.replace(GREEDY, logprobs=2),
}
LENGTHS = [1, 31, 32, 33, 95, 96, 97, 200, 500]
SECONDS = 60.0  # for what should happen at once, on a machine that may be busy


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair() -> AsyncIterator[Pair]:
    async with (
        running(settings(Role.PREFILL, "p0")) as prefill,
        running(settings(Role.DECODE, "d0")) as decode,
    ):
        yield prefill, decode


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def _nothing_stays_behind(pair: Pair) -> AsyncIterator[None]:
    """After each test, whatever it was about."""
    yield
    for engine in pair:
        await until(lambda engine=engine: idle(engine), within_s=SECONDS)


# --- the same text --------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
async def test_disaggregated_is_as_aggregated(pair: Pair, kind: str, length: int) -> None:
    prefill, decode = pair
    name, prompt, sampling = f"same-{kind}-{length}", prompt_of(length), KINDS[kind]
    alone = reached(await computed(decode, name, prompt, sampling), FinishReason.LENGTH)
    both = reached(
        await through_both(prefill, decode, name, prompt, sampling, salt=name), FinishReason.LENGTH
    )
    assert both.token_ids == alone.token_ids
    # Of a single token nothing is left once the last one is computed anew, as it always is.
    assert both.transferred_blocks == (blocks_of(length) if length > 1 else 0)
    if alone.logprobs is not None:
        assert both.logprobs is not None
        assert [entry.token_id for entry in both.logprobs] == both.token_ids
        for ours, theirs in zip(both.logprobs, alone.logprobs, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)


async def test_the_texts_are_not_the_same_by_chance(pair: Pair) -> None:
    """Other prompts give other texts: what the other tests compare could differ."""
    texts = {
        tuple((await computed(pair[1], f"chance-{seed}", prompt_of(100, seed))).token_ids)
        for seed in range(5)
    }
    assert len(texts) == 5


async def test_twelve_at_once(pair: Pair) -> None:
    prefill, decode = pair
    prompts = [prompt_of(60 + 17 * i, seed=1) for i in range(12)]
    alone = [(await computed(decode, f"twelve-{i}", prompt)).token_ids for i, prompt in enumerate(prompts)]
    both = await asyncio.gather(
        *[
            through_both(prefill, decode, f"twelve-{i}", prompt, salt=f"twelve-{i}")
            for i, prompt in enumerate(prompts)
        ]
    )
    assert [output.token_ids for output in both] == alone
    assert [output.transferred_blocks for output in both] == [blocks_of(len(prompt)) for prompt in prompts]


async def test_only_blocks_that_are_missing_are_pulled(pair: Pair) -> None:
    prefill, decode = pair
    prompt = prompt_of(200, seed=2)
    alone = await computed(decode, "partly", prompt)
    await decode.ask("first-two-blocks", prompt[:70], GREEDY, cache_salt="partly")
    partly = await through_both(prefill, decode, "partly", prompt, salt="partly")
    assert (partly.token_ids, partly.transferred_blocks) == (alone.token_ids, 7 - 2)
    # All is there by now; the last token's block is pulled all the same.
    wholly = await through_both(prefill, decode, "wholly", prompt, salt="partly")
    assert (wholly.token_ids, wholly.transferred_blocks) == (alone.token_ids, 1)
    aligned = await through_both(prefill, decode, "aligned", prompt[:96], salt="partly")
    assert aligned.transferred_blocks == 1


async def test_an_output_that_was_half_given_is_prefilled_and_handed_over_again(pair: Pair) -> None:
    """The decode worker was lost after some tokens: all of them are prompt now."""
    prefill, decode = pair
    prompt = prompt_of(90, seed=3)
    for kind in ("greedy", "penalties", "seeded"):
        sampling = KINDS[kind]
        alone = (await computed(decode, f"half-{kind}", prompt, sampling)).token_ids
        attempt = Attempt(
            f"half-{kind}-p",
            "half",
            prompt + alone[:7],
            len(prompt),
            sampling,
            prefill_only=True,
            cache_salt=kind,
        )
        prefill.submit(attempt)
        first = reached(await prefill.ended(f"half-{kind}-p"), FinishReason.PREFILLED)
        assert first.token_ids == alone[7:8]
        assert first.handoff is not None
        assert first.handoff.num_tokens == 97
        decode.submit(
            Attempt(
                f"half-{kind}-d",
                "half",
                prompt + alone[:8],
                len(prompt),
                sampling,
                handoff=first.handoff,
                cache_salt=kind,
            )
        )
        assert (await decode.ended(f"half-{kind}-d")).token_ids == alone[8:]


# --- nothing stays behind -------------------------------------------------------------------------------


def held_and_used(engine: Running) -> tuple[int, int]:
    """Its handoffs, and its blocks in use."""
    load = engine.log.steps[-1][1].load
    return load.held_handoffs, load.used_blocks


async def test_kv_is_held_until_it_is_pulled(pair: Pair) -> None:
    prefill, decode = pair
    prompt = prompt_of(100, seed=4)
    first, handoff = await prefilled(prefill, "held", prompt)
    await until(lambda: held_and_used(prefill) == (1, 4))
    decode.submit(decoding("held-d", prompt, first, handoff))
    await decode.ended("held-d")
    await until(lambda: idle(prefill), within_s=SECONDS)


async def test_kv_that_nobody_was_told_of_is_released_at_once(pair: Pair) -> None:
    prefill, _ = pair
    for i in range(3):
        await prefilled(prefill, f"unsent-{i}", prompt_of(100, seed=i))
    for i in range(3):
        prefill.engine.release(f"unsent-{i}", sent=False)
        prefill.engine.release(f"unsent-{i}", sent=False)
    prefill.engine.release("nobody", sent=False)
    await until(lambda: idle(prefill), within_s=SECONDS)


async def test_kv_that_may_be_read_is_kept(pair: Pair) -> None:
    prefill, decode = pair
    prompt = prompt_of(100, seed=5)
    first, handoff = await prefilled(prefill, "sent", prompt)
    prefill.engine.release("sent", sent=True)
    await until(lambda: held_and_used(prefill) == (0, 4), "nobody waits for it")
    await asyncio.sleep(1.2)  # more than two looks at what is held
    assert held_and_used(prefill) == (0, 4)
    decode.submit(decoding("sent-d", prompt, first, handoff))
    assert (await decode.ended("sent-d")).transferred_blocks == 4


@pytest.mark.parametrize("bias", [{2: 100.0}, {}])
async def test_an_output_that_ends_with_its_first_token_holds_nothing(
    pair: Pair, bias: dict[int, float]
) -> None:
    prefill, _ = pair
    sampling = Sampling(max_tokens=5 if bias else 1, temperature=0.0, logit_bias=bias)
    output = await prefill.ask(f"ends-{len(bias)}", prompt_of(100), sampling, prefill_only=True)
    reached(output, FinishReason.STOP if bias else FinishReason.LENGTH)
    assert output.handoff is None
    await until(lambda: idle(prefill), within_s=SECONDS)


@pytest.mark.parametrize("delay_ms", [0, 1, 3, 10, 30])
async def test_a_pull_that_is_cancelled_leaves_nothing(pair: Pair, delay_ms: int) -> None:
    prefill, decode = pair
    prompt = prompt_of(500, seed=delay_ms)
    name = f"cancelled-{delay_ms}"
    sampling = msgspec.structs.replace(GREEDY, max_tokens=3000)  # it does not end by itself before
    first, handoff = await prefilled(prefill, name, prompt, sampling)
    decode.submit(decoding(f"{name}-d", prompt, first, handoff, sampling))
    await asyncio.sleep(delay_ms / 1e3)
    decode.engine.cancel(f"{name}-d")
    reached(await decode.ended(f"{name}-d"), FinishReason.CANCELLED)
    for engine in pair:
        await until(lambda engine=engine: idle(engine), within_s=SECONDS)


@pytest.mark.parametrize("delay_ms", [0, 5, 10, 20, 40])
async def test_a_prefill_that_is_cancelled_leaves_nothing(pair: Pair, delay_ms: int) -> None:
    prefill, _ = pair
    name, prompt = f"cancelled-prefill-{delay_ms}", prompt_of(500, seed=40 + delay_ms)
    prefill.submit(Attempt(name, name, prompt, len(prompt), GREEDY, prefill_only=True))
    await asyncio.sleep(delay_ms / 1e3)
    prefill.engine.cancel(name)
    if (await prefill.ended(name)).finish_reason is FinishReason.PREFILLED:
        prefill.engine.release(name, sent=False)
    await until(lambda: idle(prefill), within_s=SECONDS)


# --- what must not be pulled ----------------------------------------------------------------------------


async def test_a_handoff_that_was_used_is_not_used_again(pair: Pair) -> None:
    prefill, decode = pair
    prompt = prompt_of(100, seed=6)
    alone = (await computed(decode, "twice", prompt)).token_ids
    first, handoff = await prefilled(prefill, "twice", prompt, salt="twice")
    for i, blocks in ((0, 4), (1, 0)):
        decode.submit(decoding(f"twice-{i}", prompt, first, handoff, salt="twice"))
        rest = await decode.ended(f"twice-{i}")
        assert first.token_ids + rest.token_ids == alone
        assert rest.transferred_blocks == blocks


def _with(**fields: Any) -> Any:
    """A handoff with other params."""

    def change(handoff: Handoff) -> Handoff:
        params = msgspec.msgpack.decode(handoff.params) | fields
        return msgspec.structs.replace(handoff, params=msgspec.msgpack.encode(params))

    return change


WRONG = {
    "too few blocks": _with(remote_block_ids=[[1, 2, 3]]),
    "another engine": _with(remote_engine_id="p7.1"),
    "no port": _with(remote_port=0),
    "no time left": _with(expires_at=1.0),
    "garbage": lambda handoff: msgspec.structs.replace(handoff, params=b"\xc1garbage"),
    "another block size": lambda handoff: msgspec.structs.replace(handoff, block_size=64),
    "another layout": lambda handoff: msgspec.structs.replace(handoff, layout="other"),
    "another prompt": lambda handoff: msgspec.structs.replace(handoff, last_hash=1),
    # These pass for right, and fail in vLLM.
    "blocks that do not exist": _with(remote_block_ids=[[2**31 - 1, 2**31 - 2, 2**31 - 3, 2**31 - 4]]),
    "a port where nobody listens": lambda handoff: msgspec.structs.replace(
        _with(remote_port=9, remote_engine_id="p7.1")(handoff), holder=Incarnation("p7", 1)
    ),
    "a port of another engine": lambda handoff: msgspec.structs.replace(
        _with(remote_engine_id="p8.1")(handoff), holder=Incarnation("p8", 1)
    ),
}


@pytest.mark.parametrize("fault", WRONG)
async def test_a_handoff_that_is_wrong_costs_only_the_prompt_s_computation(pair: Pair, fault: str) -> None:
    prefill, decode = pair
    prompt, salt = prompt_of(100, seed=7), fault
    alone = (await computed(decode, fault, prompt)).token_ids
    first, handoff = await prefilled(prefill, fault, prompt, salt=salt)
    decode.submit(decoding(f"{fault}-d", prompt, first, WRONG[fault](handoff), salt=salt))
    rest = await asyncio.wait_for(decode.ended(f"{fault}-d"), SECONDS)
    assert first.token_ids + rest.token_ids == alone
    assert rest.transferred_blocks == 0
    prefill.engine.release(fault, sent=False)
    # And the next one is pulled as ever.
    again = await through_both(prefill, decode, f"{fault}-again", prompt, salt=f"{salt}-again")
    assert (again.token_ids, again.transferred_blocks) == (alone, 4)


# --- the CPU --------------------------------------------------------------------------------------------


def cpu_seconds(pid: int) -> float:
    """A process's, all its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def test_idle_engines_leave_the_cpu_alone(pair: Pair) -> None:
    before = [cpu_seconds(engine.core_pid) for engine in pair]
    began = time.monotonic()
    await asyncio.sleep(4.0)
    for engine, start in zip(pair, before, strict=True):
        assert cpu_seconds(engine.core_pid) - start < 0.1 * (time.monotonic() - began)


async def test_engines_may_use_all_cores_that_this_process_may(pair: Pair) -> None:
    for engine in pair:
        assert os.sched_getaffinity(engine.core_pid) == os.sched_getaffinity(0)
