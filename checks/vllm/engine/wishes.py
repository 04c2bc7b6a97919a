"""What requests may ask of vLLM beyond sampling: words and tokens to avoid, and their prompt's scores."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec
import pytest

from checks.vllm.engine.pair import decoding, prefilled, prompt_of
from checks.vllm.engine.running import Running, running, settings
from penstock.shapes import Role, Sampling

GREEDY = Sampling(max_tokens=8, temperature=0.0, ignore_eos=True)
PROMPT = prompt_of(100)


@pytest.fixture
async def one() -> AsyncIterator[Running]:
    async with running(settings()) as engine:
        yield engine


async def test_a_bad_word_does_not_come(one: Running) -> None:
    plain = (await one.ask("plain", PROMPT, GREEDY)).token_ids
    for length in (1, 2):
        word = tuple(plain[2 : 2 + length])
        given = msgspec.structs.replace(GREEDY, bad_words=(word,))
        found = (await one.ask(f"bad-{length}", PROMPT, given)).token_ids
        assert found[: 1 + length] == plain[: 1 + length]
        assert found[1 + length] != plain[1 + length]
        known = PROMPT + plain[: 1 + length]
        rest = await one.ask(f"rest-{length}", known, given, prompt_len=len(PROMPT))
        assert rest.token_ids == found[1 + length :]


async def test_only_allowed_tokens_come(one: Running) -> None:
    given = msgspec.structs.replace(GREEDY, allowed_token_ids=(11, 12))
    assert set((await one.ask("allowed", PROMPT, given)).token_ids) <= {11, 12}


async def test_a_prompts_scores_are_those_of_its_tokens_one_by_one_although_it_is_cached(
    one: Running,
) -> None:
    await one.ask("cached", PROMPT, GREEDY)
    scoring = msgspec.structs.replace(GREEDY, prompt_logprobs=2)
    output = await one.ask("scored", PROMPT, scoring)
    assert output.cached_tokens == 0
    assert output.prompt_logprobs is not None
    assert [entry.token_id for entry in output.prompt_logprobs] == PROMPT[1:]
    for end in (1, 33, 99):
        forced = Sampling(max_tokens=1, allowed_token_ids=(PROMPT[end],), logprobs=2)
        (expected,) = (await one.ask(f"prefix-{end}", PROMPT[:end], forced)).logprobs or []
        found = output.prompt_logprobs[end - 1]
        assert found.logprob == pytest.approx(expected.logprob, abs=1e-3)
        assert [token_id for token_id, _ in found.top] == [token_id for token_id, _ in expected.top]
    known = PROMPT + output.token_ids[:2]
    rest = await one.ask("later", known, scoring, prompt_len=len(PROMPT))
    assert rest.prompt_logprobs is None
    assert rest.token_ids == output.token_ids[2:]


async def test_the_prefill_worker_gives_a_prompts_scores_and_the_decode_worker_does_not() -> None:
    scoring = msgspec.structs.replace(GREEDY, prompt_logprobs=1)
    async with (
        running(settings(Role.PREFILL, "p0")) as prefill,
        running(settings(Role.DECODE, "d0")) as decode,
    ):
        first, handoff = await prefilled(prefill, "x.1", PROMPT, scoring)
        assert len(first.prompt_logprobs or []) == len(PROMPT) - 1
        decode.submit(decoding("x.2", PROMPT, first, handoff, scoring))
        rest = await decode.ended("x.2")
        assert rest.prompt_logprobs is None
        assert rest.transferred_blocks
        whole = await decode.ask("y.1", PROMPT, GREEDY)
        assert first.token_ids + rest.token_ids == whole.token_ids
