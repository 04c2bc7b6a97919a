"""What requests may ask of vLLM beyond sampling: words and tokens to avoid, and their prompt's scores."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator

import msgspec
import pytest
from tokenizers import Tokenizer

from checks.vllm.engine.pair import decoding, prefilled, prompt_of
from checks.vllm.engine.running import ENGINE_ARGS, MODEL, Running, running, settings
from penstock.engines.vllm.outputs import NO_GRAMMAR
from penstock.shapes import FinishReason, JsonObject, Role, Sampling, StructuredOutput

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
        forced = Sampling(max_tokens=1, allowed_token_ids=(PROMPT[end],), logprobs=20)
        (expected,) = (await one.ask(f"prefix-{end}", PROMPT[:end], forced)).logprobs or []
        found = output.prompt_logprobs[end - 1]
        assert found.logprob == pytest.approx(expected.logprob, abs=1e-3)
        ranks = {token_id: rank for rank, (token_id, _) in enumerate(expected.top, 1)}
        assert [token_id for token_id, _ in found.top] == list(ranks)[:2]
        assert ranks.get(found.token_id) == (found.rank if found.rank <= len(ranks) else None)
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


@pytest.mark.parametrize("reproducible", [False, True])
async def test_reasoning_ends_at_its_budget_also_where_it_is_continued(reproducible: bool) -> None:
    """A reproducible request is held to its earlier tokens, another one has them in its prompt."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    (begin,), (end,) = (tokenizer.encode(mark).ids for mark in (" my", " is"))
    marks = json.dumps({"reasoning_start_str": " my", "reasoning_end_str": " is"})
    sampling = Sampling(
        max_tokens=8,
        temperature=0.5,
        seed=7,
        ignore_eos=True,
        allowed_token_ids=tuple({300, 301, 302, end} - {begin}),
        logit_bias={end: -100.0},
        reproducible=reproducible,
        thinking_budget=3,
    )
    prompt = [*PROMPT, begin]
    async with running(settings(engine_args=(*ENGINE_ARGS, "--reasoning-config", marks))) as engine:
        assert engine.card.model.answering.thinking_budget
        whole = (await engine.ask("whole", prompt, sampling)).token_ids
        assert [place for place, token_id in enumerate(whole) if token_id == end] == [3]
        for known in (1, 3, 5):
            given = prompt + whole[:known]
            rest = (await engine.ask(f"rest-{known}", given, sampling, prompt_len=len(prompt))).token_ids
            assert [place for place, token_id in enumerate(rest, known) if token_id == end] == (
                [3] if known < 4 else []
            )


async def test_json_has_no_white_space_where_none_is_wanted(one: Running) -> None:
    schema = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 3, "maxItems": 3}
    wanted = StructuredOutput("json", json.dumps(schema), disable_any_whitespace=True)
    sampling = Sampling(max_tokens=20, temperature=1.0, seed=3, structured=wanted)
    output = await one.ask("compact", PROMPT, sampling)
    text = Tokenizer.from_file(str(MODEL / "tokenizer.json")).decode(output.token_ids)
    assert re.fullmatch(r"\[[12],[12],[12]\]", text)


GUIDANCES = (
    StructuredOutput("json", '{"type": "number", "multipleOf": 3}'),
    StructuredOutput("regex", "\\p{L}+"),
)
"""What xgrammar cannot compile, or not all of it, and guidance at least by vLLM's checks."""


@pytest.mark.parametrize("wanted", GUIDANCES, ids=lambda wanted: wanted.kind)
async def test_what_xgrammar_cannot_compile_is_rejected_whatever_came_first(
    one: Running, wanted: StructuredOutput
) -> None:
    for attempt_id in ("first", "again"):
        output = await one.ask(attempt_id, PROMPT, msgspec.structs.replace(GREEDY, structured=wanted))
        assert output.finish_reason is FinishReason.REJECTED
    regex = StructuredOutput("regex", "[ab]{3}")
    sampling = Sampling(max_tokens=20, temperature=0.0, structured=regex)
    output = await one.ask("another", PROMPT, sampling)
    assert re.fullmatch(
        "[ab]{3}", Tokenizer.from_file(str(MODEL / "tokenizer.json")).decode(output.token_ids)
    )


async def test_a_grammar_that_the_core_cannot_compile_is_rejected_at_once(one: Running) -> None:
    """Here vLLM is made to take guidance's word for what its core then gives to xgrammar."""
    core = one.engine._core
    assert core is not None
    regex = StructuredOutput("regex", "[ab]{3}")
    first = await one.ask("first", PROMPT, Sampling(max_tokens=20, structured=regex))
    assert first.finish_reason is FinishReason.STOP
    core.inputs.structured_outputs_config.backend = "auto"
    wanted = msgspec.structs.replace(GREEDY, structured=GUIDANCES[1])
    output = await one.ask("refused", PROMPT, wanted)
    assert (output.finish_reason, output.error) == (FinishReason.REJECTED, NO_GRAMMAR)
    assert len((await one.ask("next", PROMPT, GREEDY)).token_ids) == GREEDY.max_tokens


async def test_named_log_probabilities_are_refused_by_name(one: Running) -> None:
    output = await one.ask("refused", PROMPT, Sampling(max_tokens=5, logprobs=1, logprob_token_ids=(7,)))
    assert output.finish_reason is FinishReason.REJECTED
    assert "logprob_token_ids" in (output.error or "")


@pytest.mark.parametrize(
    ("schema", "options", "named"),
    [
        ({}, {"whitespace_pattern": " "}, "whitespace_pattern"),
        ({"type": "nonsense"}, {"disable_any_whitespace": True}, "structured_outputs.json"),
        ({"type": "number", "multipleOf": 3}, {"disable_any_whitespace": True}, "disable_any_whitespace"),
    ],
)
async def test_options_that_vllm_cannot_obey_are_named(
    one: Running, schema: JsonObject, options: JsonObject, named: str
) -> None:
    wanted = StructuredOutput("json", json.dumps(schema), **options)
    output = await one.ask("refused", PROMPT, Sampling(max_tokens=5, structured=wanted))
    assert output.finish_reason is FinishReason.REJECTED
    assert named in (output.error or "")
