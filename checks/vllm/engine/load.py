"""An engine's load, from vLLM's own statistics and the comings and goings around them."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.v1.metrics.stats import SchedulerIterationDetails, SchedulerStats

from penstock.core.prompt_work import NO_WORK, PromptWork, prompt_work
from penstock.engines.vllm.load import CoreLoad
from penstock.shapes import EngineCard, Load, ModelCard

CARD = EngineCard(
    "vllm", ModelCard("m", max_model_len=512, vocab_size=1000), block_size=32, total_blocks=200
)


def stats(running: int, usage: float, fetching: int = 0, **details: Any) -> SchedulerStats:
    step = {
        "iteration_index": 0,
        "num_ctx_requests": 0,
        "num_ctx_tokens": 0,
        "num_generation_requests": 0,
        "num_generation_tokens": 0,
        "elapsed_ms": 1.0,
    }
    found = SchedulerStats(
        num_running_reqs=running,
        kv_cache_usage=usage,
        num_skipped_waiting_reqs=fetching,
        iteration_details=SchedulerIterationDetails(**(step | details)) if details else None,
    )
    if hasattr(found, "num_kv_fetch_reqs_by_stage"):  # since 0.32
        found.num_kv_fetch_reqs_by_stage = {"waiting_to_start": fetching} if fetching else {}
    return found


def counts(load: Load) -> tuple[int, int, int, int]:
    return (load.running, load.waiting, load.prefill_tokens, load.context_tokens)


def test_an_attempt_from_its_submission_to_its_end() -> None:
    load = CoreLoad(CARD)
    load.submitted()
    load.began()
    assert counts(load.load(PromptWork(100, 5000))) == (0, 1, 100, 0)
    assert load.load(PromptWork(100, 5000)).prefill_context_tokens == 5000
    load.observe(0, stats(running=1, usage=0.02, num_ctx_tokens=100), now=0.0)
    load.grew(101)
    assert counts(load.load(NO_WORK)) == (1, 0, 0, 101)
    assert load.load(NO_WORK).used_blocks == 4
    load.grew(1)
    assert load.load(NO_WORK).context_tokens == 102
    load.ended(102)
    assert counts(load.load(NO_WORK)) == (0, 0, 0, 0)
    assert load.load(NO_WORK).submitted == 1


def test_an_attempt_that_ends_before_its_first_token_leaves_nothing() -> None:
    load = CoreLoad(CARD)
    load.began()
    load.ended(0)
    assert counts(load.load(NO_WORK)) == (0, 0, 0, 0)


def test_one_that_never_began_counts_as_submitted_only() -> None:
    load = CoreLoad(CARD)
    load.submitted()
    assert counts(load.load(NO_WORK)) == (0, 0, 0, 0)
    assert load.load(NO_WORK).submitted == 1


def test_those_whose_kv_is_on_its_way_hold_blocks() -> None:
    load = CoreLoad(CARD)
    for _ in range(3):
        load.began()
    load.observe(0, stats(running=1, usage=0.5, fetching=1), now=0.0)
    assert counts(load.load(NO_WORK))[:2] == (2, 1)


def test_what_has_ended_here_does_not_run_there() -> None:
    """vLLM's word is a step old."""
    load = CoreLoad(CARD)
    load.began()
    load.observe(0, stats(running=4, usage=0.1), now=0.0)
    assert counts(load.load(NO_WORK))[:2] == (1, 0)


def test_empty_steps_are_signs_of_life_now_and_then_while_there_is_work() -> None:
    load = CoreLoad(CARD)
    load.observe(0, stats(0, 0.0), now=0.0)
    assert load.load(NO_WORK).steps == 0
    load.began()
    for i in range(100):
        load.observe(0, stats(0, 0.0), now=0.01 * i)
    assert load.load(NO_WORK).steps == 2
    load.responded()
    assert load.load(NO_WORK).steps == 3


def test_steps_that_compute_are_counted() -> None:
    load = CoreLoad(CARD)
    load.observe(0, stats(0, 0.0), now=0.0)
    load.observe(0, stats(0, 0.0, num_ctx_tokens=0, is_dummy=True), now=0.0)
    assert load.load(NO_WORK).steps == 0
    load.observe(0, stats(1, 0.0, num_generation_requests=1), now=0.0)
    assert load.load(NO_WORK).steps == 1


def test_data_parallel_ranks_are_added_up() -> None:
    load = CoreLoad(CARD, ranks=2)
    for _ in range(5):
        load.began()
    load.observe(0, stats(running=3, usage=0.5), now=0.0)
    assert (load.load(NO_WORK).used_blocks, load.load(NO_WORK).running) == (50, 3)
    load.observe(1, stats(running=1, usage=0.25), now=0.0)
    assert (load.load(NO_WORK).used_blocks, load.load(NO_WORK).running) == (75, 4)
    load.observe(0, stats(running=0, usage=0.0), now=0.0)
    assert (load.load(NO_WORK).used_blocks, load.load(NO_WORK).running) == (25, 1)


def test_rates_are_measured() -> None:
    """By the time between two steps, whatever vLLM says of it."""
    load = CoreLoad(CARD)
    for i in range(400):
        step = stats(1, 0.1, num_ctx_tokens=i % 50, num_generation_requests=i % 7, elapsed_ms=0.01)
        load.observe(0, step, now=0.005 * i)
        load.observe_transfer(4, 20.0)
    rates = load.load(NO_WORK).rates
    assert rates.step_ms == pytest.approx(5.0, rel=0.2)
    assert rates.transfer_ms + 4 * rates.transfer_block_ms == pytest.approx(20.0, rel=0.2)


def test_a_step_after_a_pause_began_with_what_vllm_scheduled_then() -> None:
    load = CoreLoad(CARD)
    for i in range(400):
        load.answered(i + 0.01)
        load.answered(i + 0.002)
        load.observe(0, stats(1, 0.1, num_ctx_tokens=10 * (i % 9) + 1), now=i + 0.007)
        load.answered(i + 0.003)  # it came while the step before was under way
        load.observe(0, stats(0, 0.1, num_generation_requests=1), now=i + 0.012)
        load.observe(0, stats(0, 0.1, num_generation_requests=1), now=i + 0.8)  # since when, nobody says
    assert load.load(NO_WORK).rates.step_ms == pytest.approx(5.0, rel=0.2)


def test_a_step_does_not_last_while_kv_is_awaited() -> None:
    load = CoreLoad(CARD)
    for i in range(400):
        load.observe(0, stats(0, 0.1, fetching=1), now=float(i))
        load.answered(i + 0.5)
        load.observe(0, stats(0, 0.1, num_ctx_requests=1, num_ctx_tokens=1), now=i + 0.505)
    assert load.load(NO_WORK).rates.step_ms == pytest.approx(5.0, rel=0.2)


def test_a_prompt_whose_kv_was_pulled_says_nothing_of_computing_prompts() -> None:
    """Its one token takes as long as any of an output; what else begins with it is no price of a token."""
    load = CoreLoad(CARD)
    now = 0.0
    for i in range(400):
        pulled = {"num_ctx_requests": 1, "num_ctx_tokens": 1} if i % 8 == 0 else {}
        now += 0.020 if pulled else 0.005
        load.observe(0, stats(1, 0.1, num_generation_requests=1, **pulled), now=now)
    assert load.load(NO_WORK).rates.prefill_token_ms < 0.5


def test_a_step_of_one_rank_says_nothing_of_anothers() -> None:
    load = CoreLoad(CARD, ranks=2)
    for i in range(400):
        load.observe(0, stats(1, 0.1, num_generation_requests=1 + i % 5), now=0.005 * i)
        load.observe(1, stats(1, 0.1, num_generation_requests=1 + i % 5), now=0.005 * i + 0.001)
    assert load.load(NO_WORK).rates.step_ms == pytest.approx(5.0, rel=0.3)


def test_a_prompt_that_ends_a_pause_counts_with_its_context() -> None:
    load = CoreLoad(CARD)
    for i in range(400):
        tokens = 100 * (1 + i % 7)
        work = prompt_work(0, tokens)
        load.left(work)
        load.answered(float(i))
        ms = 1.0 + 0.01 * tokens + 0.0001 * work.context_tokens
        load.observe(0, stats(0, 0.1, num_ctx_tokens=tokens), now=i + ms / 1e3)
        load.load(NO_WORK)
    rates = load.load(NO_WORK).rates
    assert rates.prefill_token_ms == pytest.approx(0.01, rel=0.3)
    assert rates.prefill_context_ms == pytest.approx(0.0001, rel=0.2)
