from __future__ import annotations

import asyncio

import pytest

from penstock.clock import VirtualClock
from penstock.engines.cost_models import cost_model
from penstock.engines.settings import SchedulerSettings
from penstock.engines.sim import SimSettings, sim_engine
from penstock.shapes import FinishReason
from penstock.transfer.sim import SimNetwork, SimTransfer, SimTransferSettings
from tests.engines.steps_log import StepsLog, attempt, running


async def test_stop_gives_running_attempts_their_grace():
    clock = VirtualClock()
    engine = sim_engine(SimSettings(), clock=clock)
    await engine.start()
    log = StepsLog(engine, clock)
    engine.submit(attempt("short", max_tokens=5))
    engine.submit(attempt("long", max_tokens=500))
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(log.read())
        tasks.create_task(engine.stop(1.0))
        await clock.advance(2.0)
    assert log.outputs("short")[-1][1].finish_reason is FinishReason.LENGTH
    at, last = log.outputs("long")[-1]
    assert last.finish_reason is FinishReason.CANCELLED
    assert at == pytest.approx(1.0, abs=0.02)


async def test_two_engines_hand_over_on_a_virtual_clock():
    clock = VirtualClock()
    network = SimNetwork()
    settings = SimTransferSettings(gigabytes_per_s=10.0, setup_ms=2.0)
    engines = [
        sim_engine(SimSettings(), SimTransfer(settings, network, name, clock), clock) for name in "pd"
    ]
    async with running(engines[0], clock) as prefill, running(engines[1], clock) as decode:
        first = attempt("p", prompt=160)
        first.prefill_only = True
        prefill.engine.submit(first)
        await clock.advance(1.0)
        [(_, output)] = prefill.outputs("p")
        assert output.handoff is not None
        second = attempt("d", prompt=160)
        second.token_ids += output.token_ids
        second.handoff = output.handoff
        sent_at = clock.now()
        decode.engine.submit(second)
        await clock.advance(1.0)
        at, first_output = decode.outputs("d")[0]
        costs = cost_model("qwen3-32b/h200/tp2")
        pull_s = 0.002 + 10 * settings.bytes_per_block / 10e9
        step_s = (costs.a0 + costs.a1 + costs.a2 * 161) / 1e3
        assert at - sent_at == pytest.approx(pull_s + step_s)
        assert first_output.transferred_blocks == 10
        assert prefill.steps[-1][1].load.held_handoffs == 0
        whole = attempt("w", prompt=160)
        prefill.engine.submit(whole)
        await clock.advance(1.0)
        assert prefill.text("w") == prefill.text("p") + decode.text("d")


async def test_expired_handoffs_are_freed_on_a_virtual_clock():
    clock = VirtualClock()
    transfer = SimTransfer(SimTransferSettings(), SimNetwork(), "p", clock)
    settings = SimSettings(scheduler=SchedulerSettings(handoff_ttl_s=7.0))
    async with running(sim_engine(settings, transfer, clock), clock) as log:
        first = attempt("p")
        first.prefill_only = True
        log.engine.submit(first)
        await clock.advance(7.0)
        assert log.steps[-1][1].load.held_handoffs == 1
        await clock.advance(1.0)
        assert log.steps[-1][1].load.held_handoffs == 0


async def test_an_attempt_that_comes_during_a_step_waits_from_then_on():
    clock = VirtualClock()
    async with running(sim_engine(SimSettings(), clock=clock), clock) as log:
        log.engine.submit(attempt("first", prompt=[7] * 2000, max_tokens=1))
        await clock.advance(0.03)
        log.engine.submit(attempt("second", max_tokens=1))
        await clock.advance(1.0)
    first, second = [report for _, step in log.steps for report in step.ended]
    assert first.ended_at > 0.06
    assert (second.submitted_at, second.began_at) == (0.03, first.ended_at)
