"""Engines that stand still in workers that live: nobody waits for them, and they are taken back."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import msgspec
import pytest

from penstock.core.deadlines import Deadlines
from penstock.core.progress import ProgressLimits
from penstock.core.settings import RouterSettings
from penstock.errors import Rejection, RequestRejected
from penstock.shapes import Role
from tests.cluster import MODEL, Cluster, cluster
from tests.waiting import until

PREFILL, DECODE, AGGREGATED = Role.PREFILL, Role.DECODE, Role.AGGREGATED
PROMPT = list(range(100))
SLOW = {"cost_model": "qwen3-32b/h200/tp2", "speedup": 2.0}  # about 6 ms a step
SETTINGS = RouterSettings(tick_s=0.02, progress=ProgressLimits(stuck_s=0.3, first_s=0.0))
ALWAYS = RouterSettings(tick_s=0.02, disagg="always", progress=ProgressLimits(stuck_s=0.3, first_s=0.0))


def state(it: Cluster, instance_id: str) -> str:
    return next(view.state for view in it.router.instances() if view.instance_id == instance_id)


async def until_state(it: Cluster, instance_id: str, wanted: str) -> None:
    await until(lambda: state(it, instance_id) == wanted, f"{instance_id} is {wanted}")


async def test_requests_leave_an_engine_that_stands_still_and_it_comes_back(tmp_path: Path) -> None:
    async with cluster(tmp_path / "calm", {"a0": AGGREGATED}) as calm:
        expected = {seed: await calm.complete(PROMPT, max_tokens=60, seed=seed) for seed in range(8)}
    async with cluster(tmp_path / "hurt", {"a0": AGGREGATED, "a1": AGGREGATED}, SETTINGS, SLOW) as it:
        answers = {seed: it.ask(PROMPT, max_tokens=60, seed=seed)[0] for seed in range(8)}
        for answer in answers.values():
            await answer.wait_tokens(2)
        with it.workers["a0"].stuck():
            for seed, answer in answers.items():
                assert await answer.tokens() == expected[seed]
            await until_state(it, "a0", "quarantined")
            view = next(view for view in it.router.instances() if view.instance_id == "a0")
            assert "no step for" in view.reason
            metrics = it.metrics.render().decode()
            assert (
                'penstock_instance_state{instance="a0",role="aggregated",state="quarantined"} 1.0'
                in metrics
            )
            assert len(await it.complete(PROMPT, seed=99)) == 8  # nothing new goes there
        await until_state(it, "a0", "ready")
        await it.wait_idle()


async def test_a_stuck_prefill_engine_is_gone_around(tmp_path: Path) -> None:
    async with cluster(tmp_path, {"p0": PREFILL, "d0": DECODE}, ALWAYS, SLOW) as it:
        await it.complete(PROMPT)
        with it.workers["p0"].stuck():
            answers = [it.ask([seed, *PROMPT], seed=seed)[0] for seed in range(4)]
            for answer in answers:
                assert len(await answer.tokens()) == 8
            assert state(it, "p0") == "quarantined"
        await until_state(it, "p0", "ready")
        await it.wait_idle()


async def test_a_lone_engine_is_left_to_finish(tmp_path: Path) -> None:
    async with cluster(tmp_path, {"a0": AGGREGATED}, SETTINGS, SLOW) as it:
        answer, _ = it.ask(PROMPT, max_tokens=300)
        await answer.wait_tokens(20)
        for _ in range(6):  # more often than an attempt may fail
            with it.workers["a0"].stuck():
                await until_state(it, "a0", "quarantined")
                assert it.router.model(MODEL).card.name == MODEL  # new requests may wait for it
            await until_state(it, "a0", "ready")
        assert len(await answer.tokens()) == 300
        assert "penstock_retries_total 0.0" in it.metrics.render().decode()


async def test_requests_leave_once_there_is_somewhere_to_go(tmp_path: Path) -> None:
    async with cluster(tmp_path, {"a0": AGGREGATED}, SETTINGS, SLOW) as it:
        answer, _ = it.ask(PROMPT, max_tokens=200)
        await answer.wait_tokens(20)
        with it.workers["a0"].stuck():
            await until_state(it, "a0", "quarantined")
            late, _ = it.ask(PROMPT)  # queued
            it.start("a1", AGGREGATED, **SLOW)
            assert len(await answer.tokens()) == 200
            assert len(await late.tokens()) == 8
        await it.wait_ready("a0", "a1")


async def test_a_router_that_was_held_up_blames_nobody(tmp_path: Path) -> None:
    async with cluster(tmp_path, {"a0": AGGREGATED, "a1": AGGREGATED}, SETTINGS, SLOW) as it:
        answers = [it.ask(PROMPT, max_tokens=300, seed=seed)[0] for seed in range(4)]
        for answer in answers:
            await answer.wait_tokens(2)
        time.sleep(1.0)  # noqa: ASYNC251
        await asyncio.sleep(0.1)
        assert {state(it, "a0"), state(it, "a1")} == {"ready"}
        for answer in answers:
            assert len(await answer.tokens()) == 300


async def test_a_late_first_token_is_an_error_that_says_so(tmp_path: Path) -> None:
    settings = msgspec.structs.replace(SETTINGS, deadlines=Deadlines(first_token_s=0.1, max_attempts=2))
    slow = {"cost_model": "qwen3-32b/h200/tp2", "speedup": 0.02}  # 600 ms a step
    async with cluster(tmp_path, {"a0": AGGREGATED}, settings, slow) as it:
        answer, _ = it.ask(PROMPT)
        with pytest.raises(RequestRejected) as caught:
            await answer.tokens()
        assert (caught.value.kind, caught.value.code) == (Rejection.TIMED_OUT, "first_token_timeout")
        assert str(caught.value) == (
            "2 attempts failed: a0: no first token within 0.1 s; a0: no first token within 0.1 s"
        )
