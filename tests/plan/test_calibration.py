"""What calibration finds out about a worker whose costs are known."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import msgspec
import pytest

from penstock.engines.cost_models import CostModel, MeasuredCosts, cost_model
from penstock.engines.settings import SchedulerSettings
from penstock.engines.sim import SimSettings, load_sim
from penstock.errors import ConfigError
from penstock.plan.calibration import (
    BURSTS,
    OUTPUT_TOKENS,
    ROUNDS,
    Burst,
    Measured,
    bursts,
    costs_of,
    itl_error,
    prompt_lengths,
    ttft_error,
)
from penstock.plan.kinds import worker_kinds
from penstock.shapes import Attempt, Rates, Sampling
from penstock.simulate.engine import OwnTokens, SimulatedEngine
from penstock.simulate.events import EventQueue
from penstock.simulate.scheduler import StridingScheduler

CACHE_TOKENS = 700_000


class Worker:
    """A sim engine on virtual time that is sent what calibration sends."""

    def __init__(self, costs: CostModel) -> None:
        self.events = EventQueue()
        blocks = CACHE_TOKENS // 16
        model = load_sim(SimSettings(vocab_size=1 << 32, block_size=16, total_blocks=blocks), None)
        settings = SchedulerSettings(max_batch_tokens=8192)
        self.engine = SimulatedEngine(
            self.events, model, OwnTokens(), costs, settings, None, lambda step, now: None
        )
        self.sent = 0

    def send(self, burst: Burst, output_tokens: int) -> Rates:
        for _ in range(burst.requests):
            self.sent += 1
            name = f"a{self.sent}"
            tokens = [1_000 + self.sent] * burst.prompt_tokens
            sampling = Sampling(max_tokens=output_tokens, seed=self.sent, ignore_eos=True)
            attempt = Attempt(name, name, tokens, len(tokens), sampling)
            self.events.after(0.0, partial(self.engine.add, attempt))
        while self.events.run_next():
            pass
        return self.engine.load().rates


def calibrated(costs: CostModel) -> CostModel:
    worker = Worker(costs)
    for tokens in prompt_lengths(40_000, seed=0):
        after_prompts = worker.send(Burst(1, tokens), 1)
    for burst in bursts(40_000, CACHE_TOKENS):
        after_decoding = worker.send(burst, OUTPUT_TOKENS)
    return costs_of(after_prompts, after_decoding)


def step_ms(costs: CostModel, prompts: list[int], decoding: int, context: int) -> float:
    new = sum(prompts)
    prompts_ms = costs.c0 + costs.c1 * new if new else 0.0
    attended = sum(tokens * tokens / 2 for tokens in prompts)
    weights_ms = max(costs.a0 if decoding else 0.0, prompts_ms)
    return weights_ms + costs.c2 * attended + costs.a1 * decoding + costs.a2 * decoding * context


@pytest.mark.parametrize(
    "name",
    ["qwen3-32b/h200/tp2", "qwen3-32b/h100/tp4", "llama-3.1-8b/h100/tp1", "llama-3.1-70b/h200/tp8"],
)
def test_fitted_costs_predict_steps_to_within_a_few_percent(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StridingScheduler, "stride", lambda self: 1)  # real engines observe each step
    known = cost_model(name)
    fitted = calibrated(known)
    for prompts, decoding, context, tolerance in [
        ([64], 0, 0, 0.15),  # c0 and a0 are one constant for the worker
        ([1000], 0, 0, 0.03),
        ([8192], 0, 0, 0.03),
        ([], 1, 100, 0.03),
        ([], 16, 1000, 0.03),
        ([], 64, 2000, 0.03),
        ([], 128, 4000, 0.03),
        ([2000], 32, 1000, 0.03),
    ]:
        exact_ms = step_ms(known, prompts, decoding, context)
        assert step_ms(fitted, prompts, decoding, context) == pytest.approx(exact_ms, rel=tolerance)


def test_what_does_not_fit_is_not_sent() -> None:
    assert max(prompt_lengths(5_000, seed=0)) == 4096
    assert len(bursts(40_000, 700_000)) == ROUNDS * len(BURSTS)
    sent = bursts(5_000, 20_000)
    assert sent
    assert all(it.requests * (it.prompt_tokens + OUTPUT_TOKENS) <= 20_000 for it in sent)
    assert all(it.prompt_tokens <= 5_000 for it in sent)


def test_errors_are_medians_of_relative_differences() -> None:
    costs = CostModel(c0=10.0, c1=0.1, a0=20.0, a1=1.0, a2=0.001)
    prompts = [Measured(1, 100, 25.0, 0.0), Measured(1, 900, 100.0, 0.0), Measured(1, 5000, 1.0, 0.0)]
    assert ttft_error(costs, prompts, 2048) == pytest.approx(0.1), "20 of 25, 100 of 100"
    batches = [Measured(10, 100 - OUTPUT_TOKENS / 2, 0.0, 62.0)]
    assert itl_error(costs, batches) == pytest.approx(0.5), "31 of 62"


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("", "truncated"),
        ('{"costs": {"c0": "x"}}', "Expected `float`"),
        ('{"costs": {}}', "missing required"),
    ],
)
def test_a_file_that_holds_no_costs_is_named(content: str, error: str, tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=f"costs.json: .*{error}"):
        cost_model(str(path))
    with pytest.raises(ConfigError, match=r"nowhere\.json"):
        cost_model(str(tmp_path / "nowhere.json"))


def test_measured_costs_can_be_planned_with(tmp_path: Path) -> None:
    path, costs = tmp_path / "costs.json", CostModel(c0=1.0, a0=2.0)
    path.write_bytes(msgspec.json.encode(MeasuredCosts(costs, "org/model", 4, 123_456, 0.01, 0.02)))
    assert cost_model(str(path)) == costs
    (kind,) = worker_kinds(str(path))
    assert (kind.cost_model, kind.model, kind.gpus) == (str(path), "org/model", 4)
    assert kind.cache_tokens == 123_456
