"""When a worker is full, in places, blocks and time between tokens."""

from __future__ import annotations

import random

import pytest
from msgspec.structs import replace

from penstock.core.costs import MISS_SHARE, STEP_TOKENS, Candidate, OutputLengths, Query, costs, shared_ms
from penstock.core.policy import Path, choose
from penstock.core.prompt_work import NO_WORK, PromptWork
from penstock.core.worker_load import StepUnderWay
from penstock.shapes import Load, Rates, Role

RATES = Rates(10.0, 0.05, 0.1, prefill_context_ms=0.0, decode_context_ms=0.0)
USUAL = PromptWork(40_000, 0)  # 2 s
MISS_MS = MISS_SHARE * 2_000.0
QUERY = Query(prompt_tokens=160, expected_output_tokens=100.0, usual_prompt=USUAL)


def candidate(
    instance_id: str = "a0", role: Role = Role.AGGREGATED, max_running: int = 0, **load: int
) -> Candidate:
    return Candidate(instance_id, role, Load(rates=RATES, **load), 16, max_running=max_running)


def wait_ms(query: Query, it: Candidate) -> float:
    return costs(query, it).queue_ms


def test_a_place_is_waited_for() -> None:
    step_ms = 10.0 + 0.1 * 8
    assert wait_ms(QUERY, candidate(max_running=8, running=7)) == 0.0
    assert wait_ms(QUERY, candidate(max_running=8, running=8)) == pytest.approx(100 * step_ms / 8)
    assert wait_ms(QUERY, candidate(max_running=8, running=8, waiting=3)) == pytest.approx(
        4 * 100 * step_ms / 8
    )
    assert wait_ms(QUERY, candidate(running=10_000)) == 0.0  # nobody said how many there are


def test_blocks_are_kept_for_those_that_run() -> None:
    room = candidate(running=10, used_blocks=0, total_blocks=100)
    # 10 needed, and 10 * 100 * 0.25 / 16 for the others
    assert wait_ms(QUERY, replace(room, load=replace(room.load, used_blocks=75))) == 0.0
    assert wait_ms(QUERY, replace(room, load=replace(room.load, used_blocks=76))) > 0.0
    prefill = candidate(role=Role.PREFILL, running=10, used_blocks=90, total_blocks=100)
    assert wait_ms(QUERY, prefill) == 0.0  # prompts do not grow
    assert wait_ms(QUERY, candidate(used_blocks=90, total_blocks=100)) == 0.0  # nobody to keep them for


def with_running(it: Candidate, running: int) -> Candidate:
    return replace(it, load=replace(it.load, running=running))


def missed_ms(it: Candidate, running: int, slo_itl_ms: float = 20.0) -> float:
    return costs(replace(QUERY, slo_itl_ms=slo_itl_ms), with_running(it, running)).missed_ms


def test_nobody_misses_an_objective_that_there_is_not() -> None:
    assert missed_ms(candidate(), 10_000, slo_itl_ms=0.0) == 0.0


def test_a_miss_costs_what_the_usual_prompt_takes() -> None:
    it, query = with_running(candidate(), 2_000), replace(QUERY, slo_itl_ms=20.0)
    half = replace(query, usual_prompt=PromptWork(USUAL.tokens // 2, 0))
    assert costs(half, it).missed_ms == pytest.approx(costs(query, it).missed_ms / 2)
    assert costs(replace(query, usual_prompt=NO_WORK), it).missed_ms == 0.0  # none was sent yet


def test_a_request_on_a_worker_far_from_its_limit_makes_nobody_miss_the_objective() -> None:
    assert missed_ms(candidate(role=Role.DECODE), 10, slo_itl_ms=200.0) < 0.05 * MISS_MS


def test_a_request_on_a_worker_far_beyond_its_limit_only_misses_the_objective_itself() -> None:
    assert missed_ms(candidate(role=Role.DECODE), 2_000) == pytest.approx(MISS_MS, rel=0.01)


BUSY = replace(candidate(), prompt_tokens=2_000.0, output_tokens=100.0)
"""A token takes 1.1 ms more for each request, so 100 ms with 82 of them."""


def test_a_request_on_a_worker_at_its_limit_costs_its_others_more_than_itself() -> None:
    assert missed_ms(BUSY, 82, slo_itl_ms=100.0) > 1.4 * MISS_MS
    assert missed_ms(BUSY, 400, slo_itl_ms=100.0) < 1.01 * MISS_MS


def test_a_worker_whose_requests_have_long_prompts_computed_meanwhile_reaches_its_limit_sooner() -> None:
    decode = candidate(role=Role.DECODE)
    both = replace(candidate(), prompt_tokens=800.0)  # 0.4 ms more for each
    assert missed_ms(both, 15) > 2 * missed_ms(decode, 15)


def test_a_prefill_worker_has_no_tokens_to_delay() -> None:
    assert missed_ms(candidate(role=Role.PREFILL), 10_000) == 0.0


def test_requests_pile_up_where_the_objective_is_missed_anyway_once_everybody_is_at_the_limit() -> None:
    query = Query(16, expected_output_tokens=10.0, slo_itl_ms=100.0, usual_prompt=USUAL)
    workers = [
        replace(with_running(BUSY, running), instance_id=name)
        for name, running in (("a0", 82), ("a1", 400), ("a2", 82))
    ]
    decision = choose(query, workers, rng=random.Random(0))
    assert decision is not None
    assert decision.decode == "a1"
    decision = choose(replace(query, slo_itl_ms=1_000.0), workers, rng=random.Random(0))
    assert decision is not None
    assert decision.decode != "a1"


def test_a_decision_says_how_long_the_least_busy_workers_take_to_begin() -> None:
    busy = candidate("a0", prefill_tokens=10_000)
    idle = candidate("a1", prefill_tokens=100)
    decision = choose(QUERY, [busy, idle], rng=random.Random(0))
    assert decision is not None
    assert decision.wait_ms == wait_ms(QUERY, idle)
    prefills = [candidate(f"p{n}", Role.PREFILL, prefill_tokens=n * 1000) for n in (3, 2)]
    decode = candidate("d0", Role.DECODE)
    remote = choose(QUERY, [*prefills, decode], disagg="always", rng=random.Random(0))
    assert remote is not None
    assert remote.path is Path.REMOTE
    assert remote.wait_ms == wait_ms(QUERY, prefills[1])


def test_output_lengths_are_learned() -> None:
    lengths = OutputLengths()
    assert lengths.mean("m", "t") is None
    lengths.ended("m", "t", 20, prior=110.0)
    assert lengths.mean("m", "t") == pytest.approx(100.0, rel=0.01)
    for _ in range(500):
        lengths.ended("m", "t", 20, prior=110.0)
    assert lengths.mean("m", "t") == pytest.approx(20, rel=0.05)
    assert lengths.mean("m", "other") is None
    for _ in range(2000):
        lengths.ended("m", "t", 0, prior=110.0)
    assert lengths.mean("m", "t") == 1.0
    lengths.forget("m")
    assert lengths.mean("m", "t") is None


def test_a_prompt_waits_for_what_is_left_of_the_step_under_way() -> None:
    """Steps of 10.8 ms, and 0.05 ms for a prompt token."""
    decoding = candidate(running=8)
    assert wait_ms(QUERY, replace(decoding, step=StepUnderWay(4.0, NO_WORK))) == pytest.approx(6.8)
    assert wait_ms(QUERY, replace(decoding, step=StepUnderWay(99.0, NO_WORK))) == 0.0, "longer than usual"
    assert wait_ms(QUERY, decoding) == 0.0, "nothing is known of it"
    prompts = replace(candidate(running=8, prefill_tokens=1000), step_tokens=800)
    assert wait_ms(QUERY, prompts) == shared_ms(prompts) + 40.0 == pytest.approx(50.0)
    computed = replace(prompts, step=StepUnderWay(30.0, PromptWork(800, 0)))
    assert wait_ms(QUERY, computed) == pytest.approx(50.0 + 10.8 - 30.0)
    assert shared_ms(computed) == pytest.approx(10.0), "200 tokens that the next step computes"
    following = replace(prompts, step=StepUnderWay(4.0, NO_WORK))
    assert wait_ms(QUERY, following) == pytest.approx(50.0 + 10.8 - 4.0), "they came during this step"


def test_a_queue_costs_only_the_steps_that_it_adds() -> None:
    queued = candidate(running=8, prefill_tokens=STEP_TOKENS - 160)
    assert wait_ms(QUERY, queued) == pytest.approx(0.05 * (STEP_TOKENS - 160)), "all in one step"
    longer = replace(queued, load=replace(queued.load, prefill_tokens=STEP_TOKENS))
    assert wait_ms(QUERY, longer) == pytest.approx(0.05 * STEP_TOKENS + 10.8)
