"""A request runs only on workers of the model's revision that it was tokenized for."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from penstock.core.deadlines import Deadlines
from penstock.core.settings import RouterSettings
from penstock.errors import ModelReplaced, Rejection, RemoteError, RequestRejected
from penstock.shapes import ModelView, Role
from tests.cluster import MODEL, QUICK, WAIT_S, Cluster, cluster

AGGREGATED = Role.AGGREGATED
PROMPT = list(range(100))
OLD: dict[str, Any] = {"cost_model": "qwen3-32b/h200/tp2", "speedup": 2.0}  # about 6 ms a step
NEW: dict[str, Any] = {**OLD, "vocab_size": 600}  # the files that follow from it differ, too
LONG = 200  # tokens, about a second


async def until_states(it: Cluster, **states: str) -> None:
    async with asyncio.timeout(WAIT_S):
        while {view.instance_id: view.state for view in it.router.instances()} != states:
            await asyncio.sleep(0.01)


def vocabulary(it: Cluster) -> int:
    return it.router.model(MODEL).card.vocab_size


async def test_two_workers_that_connect_together_with_different_files_do_not_both_serve(
    tmp_path: Path,
) -> None:
    """Also while the files of both are still being prepared."""

    async def prepare(model: ModelView) -> None:
        await asyncio.sleep(0.1)

    async with cluster(tmp_path, {}, prepare=prepare) as it:
        it.start("a0", AGGREGATED, **OLD)
        it.start("b0", AGGREGATED, **NEW)
        await until_states(it, a0="ready", b0="standby")
        (reason,) = [view.reason for view in it.router.instances() if view.reason]
        assert reason == "another revision of sim is served, with other vocab_size"
        for seed in range(20):
            await it.complete(PROMPT, seed=seed)
        loads = {view.instance_id: view.load for view in it.router.instances()}
        assert loads["a0"].submitted == 20
        assert loads["b0"].submitted == 0


async def test_a_stream_ends_with_an_error_when_its_revision_is_gone(tmp_path: Path) -> None:
    async with cluster(tmp_path, {"a0": AGGREGATED}, sim=OLD) as it:
        answer, _ = it.ask(PROMPT, max_tokens=LONG)
        await answer.wait_tokens(3)
        it.start("b0", AGGREGATED, **NEW)
        await until_states(it, a0="ready", b0="standby")
        await it.workers.pop("a0").die()
        with pytest.raises(ModelReplaced) as caught:
            await answer.tokens()
        assert (caught.value.kind, caught.value.code) == (Rejection.UNAVAILABLE, "model_replaced")
        assert vocabulary(it) == NEW["vocab_size"]
        assert len(await it.complete(PROMPT)) == 8


async def test_a_request_of_a_replaced_revision_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    """It was tokenized while the workers changed."""
    async with cluster(tmp_path, {"a0": AGGREGATED}, sim=OLD) as it:
        before = it.revision
        it.start("b0", AGGREGATED, **NEW)
        await until_states(it, a0="ready", b0="standby")
        await it.workers["a0"].leave()
        await it.wait_ready("b0")
        with pytest.raises(ModelReplaced):
            it.ask(PROMPT, revision=before)


async def test_nothing_is_kept_of_a_model_that_is_gone(tmp_path: Path) -> None:
    settings = RouterSettings(tick_s=0.02, deadlines=Deadlines(queue_s=0.2))
    async with cluster(tmp_path, {"a0": AGGREGATED}, settings) as it:
        await it.complete(PROMPT)
        it.metrics.frontend.of(MODEL).output_tokens.inc(8)
        it.metrics.frontend.requests.labels(MODEL, "completions", 200, "ok").inc()
        await it.workers["a0"].leave()
        async with asyncio.timeout(WAIT_S):
            while it.router.dispatcher.queues:
                await asyncio.sleep(0.02)
        assert f'model="{MODEL}"' not in it.metrics.render().decode()
        with pytest.raises(RequestRejected) as caught:
            it.router.model(MODEL)
        assert caught.value.kind is Rejection.UNAVAILABLE
        it.start("a0", AGGREGATED)
        await it.wait_ready("a0")
        assert len(await it.complete(PROMPT)) == 8


async def test_a_model_whose_worker_died_is_kept_for_a_while(tmp_path: Path) -> None:
    async with cluster(tmp_path, {"a0": AGGREGATED}, QUICK, OLD) as it:
        before, worker = it.revision, it.workers.pop("a0")
        worker.dies_of(5)
        _, poison = it.ask([5])
        await it.wait_ready()
        poison.cancel()
        await asyncio.sleep(1.2)  # beyond a sweep
        assert it.revision == before
        answer, _ = it.ask(PROMPT)
        it.start("a0", AGGREGATED, **OLD)
        assert len(await answer.tokens()) == 8
        with pytest.raises(RemoteError):
            await worker.task
        await worker.engine.stop(0)
