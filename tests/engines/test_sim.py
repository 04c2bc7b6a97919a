from __future__ import annotations

import asyncio
import math
from itertools import pairwise

import pytest

from penstock.clock import MonotonicClock, VirtualClock
from penstock.engines.batch import BatchRow, Sequence
from penstock.engines.cost_models import cost_model
from penstock.engines.sim import SimRunner, SimSettings, load_sim, sim_engine
from penstock.engines.virtual import VirtualEngine
from penstock.errors import ConfigError
from penstock.shapes import FinishReason, Sampling
from tests.engines.steps_log import attempt, running

ZERO = SimSettings(cost_model="zero", vocab_size=1000)


def row(seed: int = 1, position: int = 0, **sampling: object) -> BatchRow:
    sampling = Sampling(max_tokens=100, seed=seed, **sampling)  # type: ignore[arg-type,assignment]
    sequence = Sequence("a", [5] * (3 + position), 3, sampling)  # type: ignore[arg-type]
    return BatchRow(sequence, 0, 3 + position, True)


def drawn(settings: SimSettings, *rows: BatchRow) -> list[int]:
    samples = SimRunner(settings, range(settings.vocab_size or 0)).run(list(rows))
    return [sample.token_id for sample in samples if sample is not None]


def test_tokens_depend_on_seed_and_position_alone():
    tokens = drawn(ZERO, *(row(seed, position) for seed in range(10) for position in range(10)))
    assert tokens == drawn(ZERO, *(row(seed, position) for seed in range(10) for position in range(10)))
    assert len(set(tokens)) > 80
    assert all(0 <= token < 1000 for token in tokens)
    assert drawn(ZERO, row(seed=-1), row(seed=1 << 70))


def test_eos_and_stop_tokens_are_stepped_over():
    settings = SimSettings(cost_model="zero", vocab_size=4, eos_token_ids=(1,))
    rows = [row(seed, stop_token_ids=(2,)) for seed in range(50)]
    assert set(drawn(settings, *rows)) == {0, 3}
    assert drawn(settings, row(stop_token_ids=(0, 2, 3)))  # nothing is left: any will do


def test_eos_comes_at_its_rate_and_not_before_min_tokens():
    settings = SimSettings(cost_model="zero", vocab_size=100, eos_token_ids=(7,), eos_rate=0.25)
    tokens = drawn(settings, *(row(seed) for seed in range(1000)))
    assert 200 < tokens.count(7) < 300
    assert 7 not in drawn(settings, *(row(seed, min_tokens=1) for seed in range(100)))


def test_logprobs_are_those_of_the_draw():
    [sample] = SimRunner(ZERO, range(1000)).run([row(logprobs=3)])
    assert sample is not None
    assert sample.logprob is not None
    assert sample.logprob.logprob == pytest.approx(math.log(1 / 1000))
    assert len(sample.logprob.top) == len({token for token, _ in sample.logprob.top}) == 3
    assert sample.logprob.top[0][0] == sample.token_id


def test_rows_without_a_sample_have_none():
    prefill = row()
    prefill.sample = False
    assert SimRunner(ZERO, range(1000)).run([prefill]) == [None]


@pytest.mark.parametrize(
    "fields",
    [
        {"speedup": 0},
        {"total_blocks": 0},
        {"eos_rate": 2.0},
        {"eos_rate": 0.5},
        {"eos_token_ids": (7,), "vocab_size": 7},
        {"vocab_size": 1, "eos_token_ids": (0,)},
    ],
)
def test_bad_settings_are_refused(fields: dict[str, object]):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        SimSettings(**fields)  # type: ignore[arg-type]


def test_no_context_is_longer_than_the_blocks_can_hold():
    assert load_sim(SimSettings(block_size=16, total_blocks=10), None).card.model.max_model_len == 160
    assert load_sim(SimSettings(block_size=16, max_model_len=50), None).card.model.max_model_len == 50


async def test_an_unknown_cost_model_is_refused():
    with pytest.raises(ConfigError, match="qwen3-32b/h200/tp2"):
        sim_engine(SimSettings(cost_model="abacus"))


async def test_steps_take_the_models_time_on_a_virtual_clock():
    clock = VirtualClock()
    async with running(sim_engine(SimSettings(vocab_size=1000), clock=clock), clock) as log:
        log.engine.submit(attempt("a", prompt=1000))
        await clock.advance(10)
    costs = cost_model("qwen3-32b/h200/tp2")
    times = [at for at, _ in log.outputs("a")]
    prefill = costs.c0 + costs.c1 * 1000 + costs.c2 * 1000 * 500
    assert times[0] == pytest.approx(prefill / 1e3)
    for i, (before, after) in enumerate(pairwise(times)):
        assert after - before == pytest.approx((costs.a0 + costs.a1 + costs.a2 * (1001 + i)) / 1e3)
    assert log.outputs("a")[-1][1].finish_reason is FinishReason.LENGTH
    rates = log.steps[-1][1].load.rates
    assert rates.step_ms > 0


async def test_the_same_work_is_the_same_on_both_clocks():
    logs = []
    for clock in (None, VirtualClock()):
        measured = clock or MonotonicClock()
        settings = SimSettings(vocab_size=1000, speedup=1000.0)
        async with running(sim_engine(settings, clock=clock), measured) as log:
            for i in range(5):
                log.engine.submit(attempt(f"{i}", prompt=50 + i, seed=i))
            async with asyncio.timeout(60):
                while not all(log.text(f"{i}")[9:] for i in range(5)):
                    if clock is not None:
                        await clock.advance(0.001)
                    await asyncio.sleep(0.001)
        logs.append(log)
    for i in range(5):
        assert logs[0].text(f"{i}") == logs[1].text(f"{i}")


async def test_a_real_step_takes_its_time():
    clock = MonotonicClock()
    settings = SimSettings(vocab_size=1000, speedup=2.0)
    async with running(sim_engine(settings), clock) as log:
        log.engine.submit(attempt("a"))
        async with asyncio.timeout(60):
            while not log.text("a")[9:]:
                await asyncio.sleep(0.005)
    times = [at for at, _ in log.outputs("a")]
    assert times[-1] - times[0] > 9 * 0.0054


async def test_serves_the_files_of_a_folder(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    (tmp_path / "config.json").write_bytes(b'{"vocab_size": 1024, "hidden_size": 7}')
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    engine = sim_engine(SimSettings(assets=str(tmp_path)), clock=VirtualClock())
    assert isinstance(engine, VirtualEngine)
    card = await engine.start()
    await engine.stop(0)
    assert {name: engine.asset(sha256) for name, sha256 in card.model.assets.items()} == {
        "tokenizer.json": b"{}",
        "config.json": b'{"vocab_size": 1024, "hidden_size": 7}',
    }
    assert engine.asset("0" * 64) is None
    assert card.model.vocab_size == 1024
    beyond = SimSettings(assets=str(tmp_path), eos_token_ids=(1024,))
    with pytest.raises(ConfigError, match="eos_token_ids must be in the vocabulary of 1024"):
        await sim_engine(beyond, clock=VirtualClock()).start()
    (tmp_path / "config.json").write_bytes(b"{}")
    with pytest.raises(ConfigError, match=r"config.json: .*vocab_size"):
        await sim_engine(SimSettings(assets=str(tmp_path)), clock=VirtualClock()).start()
    with pytest.raises(ConfigError, match="not a folder"):
        await sim_engine(SimSettings(assets=str(tmp_path / "none"))).start()
