"""Workers with the step times of real GPUs, on virtual time: what they measure of themselves is what their
cost model says, whatever part of the load each of them got.

The load is like a public conversation trace (Mooncake): prompts of 12,000 tokens on average, most of them
shorter and some far longer, a third of the tokens cached, and outputs of 343 tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from random import Random
from statistics import median

import pytest

from penstock.core.costs import Candidate, Query, costs
from penstock.engines.cost_models import CostModel, cost_model
from penstock.engines.step_times import StepTimes, StepWork
from penstock.shapes import Load, Rates, Role

NAMES = [
    "llama-3.1-8b/h100/tp1",
    "llama-3.1-70b/h200/tp4",
    "qwen3-32b/h200/tp2",
    "qwen3-32b/h100/tp2",
    "qwen3-32b-fp8/h200/tp1",
    "qwen3-0.6b/h200/tp1",
]
BATCH_TOKENS = 8192
MAX_RUNNING = 256
BUSY = 0.5
"""Of the time, the part for which prompts alone would keep a worker busy."""

Steps = list[tuple[StepWork, float]]
"""What each step computed, and what it takes without noise."""


def prompt_tokens(rng: Random) -> int:
    return max(50, min(120_000, int(rng.lognormvariate(8.84, 1.06))))  # mean 12,000, median 6,900


def output_tokens(rng: Random) -> int:
    return max(1, int(rng.gammavariate(1.7, 343 / 1.7)))


def work_ms(model: CostModel, work: StepWork) -> float:
    """As CostModel.step_ms, of a whole batch."""
    prompts_ms = model.c0 + model.c1 * work.prefill_tokens if work.prefill_tokens else 0.0
    weights_ms = max(model.a0 if work.decode_requests else 0.0, prompts_ms)
    context_ms = model.c2 * work.prefill_context_tokens + model.a2 * work.decode_context_tokens
    return weights_ms + context_ms + model.a1 * work.decode_requests


class Prompt:
    def __init__(self, rng: Random) -> None:
        self.length = prompt_tokens(rng)
        self.computed = int(self.length * rng.random()) if rng.random() < 0.7 else 0


def live(
    model: CostModel,
    seed: int,
    seconds: float,
    times: StepTimes,
    factor: Callable[[float], float] = lambda s: 1,
) -> Steps:
    """One worker takes its share of the load for so long; `factor`: how much slower it is by then."""
    rng = Random(seed)
    samples = [Prompt(rng) for _ in range(300)]
    mean_ms = sum(
        model.c1 * (it.length - it.computed) + model.c2 * (it.length**2 - it.computed**2) / 2
        for it in samples
    ) / len(samples)
    steps: Steps = []
    now, arrives = 0.0, 0.0
    waiting: deque[Prompt] = deque()
    decoding: list[list[int]] = []  # of each: tokens left, context
    while now < seconds:
        while arrives <= now:
            waiting.append(Prompt(rng))
            arrives += rng.expovariate(BUSY * 1e3 / mean_ms)
        if not waiting and not decoding:
            now = arrives
            continue
        budget, new, before = BATCH_TOKENS - len(decoding), 0, 0.0
        begun: list[list[int]] = []
        while waiting and budget and len(decoding) + len(begun) < MAX_RUNNING:
            it = waiting[0]
            count = min(budget, it.length - it.computed)
            new += count
            before += count * (it.computed + count / 2)
            it.computed += count
            budget -= count
            if it.computed == it.length:
                begun.append([output_tokens(rng), it.length])
                waiting.popleft()
        work = StepWork(new, before, len(decoding), sum(context for _, context in decoding))
        ms = work_ms(model, work) * factor(now)
        noisy_ms = ms * rng.lognormvariate(0.0, 0.05)
        times.observe(work, noisy_ms)
        steps.append((work, ms))
        now += noisy_ms / 1e3
        for request in decoding:
            request[0] -= 1
            request[1] += 1
        decoding = [request for request in decoding if request[0] > 0] + begun
    return steps


def predicted_ms(rates: Rates, work: StepWork) -> float:
    return (
        rates.step_ms
        + rates.prefill_token_ms * work.prefill_tokens
        + rates.prefill_context_ms * work.prefill_context_tokens
        + rates.decode_request_ms * work.decode_requests
        + rates.decode_context_ms * work.decode_context_tokens
    )


def terms(rates: Rates, prompt: int, cached: int, requests: int, context: int) -> tuple[float, float]:
    """The predicted (prefill ms, decode ms) of one query."""
    load = Load(running=requests, context_tokens=context, rates=rates)
    candidate = Candidate("w", Role.AGGREGATED, load, 1, overlap_blocks=cached)
    it = costs(Query(prompt, expected_output_tokens=343.0), candidate)
    return it.prefill_ms, it.decode_ms


def true_terms(
    model: CostModel, prompt: int, cached: int, requests: int, context: int
) -> tuple[float, float]:
    prefill_ms, computed = 0.0, cached
    while computed < prompt:
        count = min(8192, prompt - computed)
        prefill_ms += work_ms(model, StepWork(count, count * (computed + count / 2), requests, context))
        computed += count
    decode = StepWork(decode_requests=requests + 1, decode_context_tokens=context + prompt + 171)
    return prefill_ms, 343 * work_ms(model, decode)


QUERIES = [
    (prompt, cached, requests, requests * 12_000)
    for prompt, cached in [
        (1_000, 0),
        (7_000, 0),
        (7_000, 5_000),
        (27_000, 0),
        (27_000, 20_000),
        (85_000, 0),
    ]
    for requests in (2, 10, 20)
]


@pytest.mark.parametrize("name", NAMES)
def test_two_minutes_of_load_teach_the_cost_model(name: str) -> None:
    model, times = cost_model(name), StepTimes()
    steps = live(model, 0, 120.0, times)
    rates = times.rates()
    recent = steps[-len(steps) // 2 :]
    assert median(abs(predicted_ms(rates, work) / ms - 1) for work, ms in recent) < 0.05
    for query in QUERIES:
        assert terms(rates, *query) == pytest.approx(true_terms(model, *query), rel=0.15), (query, rates)


@pytest.mark.parametrize("name", ["qwen3-32b/h200/tp2", "llama-3.1-8b/h100/tp1"])
def test_equal_workers_with_different_requests_predict_alike(name: str) -> None:
    model = cost_model(name)
    measured = []
    for seed in range(8):
        times = StepTimes()
        live(model, seed, 60.0, times)
        measured.append(times.rates())
    for query in QUERIES:
        for values in zip(*(terms(rates, *query) for rates in measured), strict=True):
            assert max(values) / min(values) < 1.3, (query, values)


@pytest.mark.parametrize("factor", [10.0, 0.1])
def test_a_machine_of_another_speed_is_believed_within_a_minute(factor: float) -> None:
    model, times = cost_model("qwen3-32b/h200/tp2"), StepTimes()
    live(model, 0, 180.0, times, lambda seconds: factor if seconds > 120.0 else 1.0)
    rates = times.rates()
    for query in QUERIES:
        expected = [factor * ms for ms in true_terms(model, *query)]
        assert terms(rates, *query) == pytest.approx(expected, rel=0.3), query
