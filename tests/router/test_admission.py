"""Overload, through the router and real workers: who waits, who goes first, who is sent away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from penstock.core.admission import AdmissionSettings, waiting_bytes
from penstock.core.settings import RouterSettings
from penstock.errors import Rejection, RequestRejected
from penstock.shapes import ModelKey, Rates, Request, Role, Sampling
from tests.cluster import WAIT_S, Cluster, cluster

ONE = {"a0": Role.AGGREGATED}
PROMPT = list(range(100))
SLOW = {"cost_model": "qwen3-32b/h200/tp2", "speedup": 4.0}  # about 3 ms a step
ONE_PLACE = {**SLOW, "scheduler": {"max_running": 1}}
LONG = 3900  # tokens that outlast a test


def limits(**admission: float) -> RouterSettings:
    return RouterSettings(tick_s=0.02, admission=AdmissionSettings(**admission))  # type: ignore[arg-type]


def request_of(token_ids: list[int]) -> Request:
    return Request("r", ModelKey("sim", ""), token_ids, Sampling(max_tokens=8))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.005)


async def occupy(it: Cluster) -> Awaitable[list[int]]:
    """Fill the only place, and the worker's queue up to where the router stops sending, once the worker has
    measured how fast it is."""
    answer, ticket = it.ask(PROMPT, max_tokens=LONG)
    await answer.wait_tokens(1)
    await until(lambda: it.router.instances()[0].load.rates != Rates())
    it.ask(PROMPT, max_tokens=1)
    await until(lambda: it.queued > 0)
    return ticket


async def test_who_would_wait_too_long_hears_so_at_once_with_figures(tmp_path: Path) -> None:
    async with cluster(tmp_path, ONE, limits(max_wait_ms=3000.0), sim=ONE_PLACE) as it:
        running = await occupy(it)
        refused = None
        while refused is None:
            try:
                answer, _ = it.ask(PROMPT)
                refused = answer.error
            except RequestRejected as error:
                refused = error
            assert it.queued < 1000
        assert isinstance(refused, RequestRejected)
        assert (refused.kind, refused.code) == (Rejection.OVERLOADED, "overloaded")
        assert refused.retry_after_s is not None
        assert refused.retry_after_s >= 1
        assert "reason=wait" in refused.message
        assert "bound_ms=3000" in refused.message
        with pytest.raises(RequestRejected):
            it.router.check("sim", "", 0)
        it.router.check("sim", "", -1)
        it.router.check("sim", "other", 0)
        exposition = it.metrics.render().decode()
        assert 'penstock_rejected_total{reason="wait"} 2.0' in exposition
        assert f'penstock_queued{{model="sim"}} {float(it.queued)}' in exposition
        assert 'penstock_saturation_seconds{model="sim"}' in exposition
        running.cancel()
        await until(lambda: it.queued == 0)
        await it.wait_idle()
        assert len(await it.complete(PROMPT)) == 8  # nothing of that sticks


async def test_what_waits_is_bounded_in_bytes_and_leaves_room_for_others(tmp_path: Path) -> None:
    settings = limits(max_wait_ms=1e9, max_queued_bytes=20 * waiting_bytes(request_of(PROMPT)))
    async with cluster(tmp_path, ONE, settings, sim=ONE_PLACE) as it:
        running = await occupy(it)
        assert it.queued == 1
        answers = [it.ask(PROMPT, tenant="greedy")[0] for _ in range(10)]  # half of what is left
        with pytest.raises(RequestRejected, match="reason=full limit=bytes") as raised:
            it.ask(PROMPT, tenant="greedy")
        assert (raised.value.kind, raised.value.code) == (Rejection.OVERLOADED, "overloaded")
        answers.append(it.ask(PROMPT, tenant="modest")[0])
        running.cancel()
        for answer in answers:
            assert len(await answer.tokens()) == 8
        assert len(await it.complete(PROMPT, tenant="greedy")) == 8


async def test_what_waits_does_so_in_the_frontend_when_prefill_is_the_limit(tmp_path: Path) -> None:
    """Neither the prefill worker's queue nor KV that waits to be pulled piles up."""
    settings = RouterSettings(
        tick_s=0.02,
        disagg="always",
        admission=AdmissionSettings(dispatch_wait_ms=20.0, max_wait_ms=120_000.0),
    )
    roles = {"p0": Role.PREFILL, "d0": Role.DECODE}
    async with cluster(tmp_path, roles, settings, sim=SLOW) as it:
        answers = [it.ask([number, *range(400)], max_tokens=4)[0] for number in range(60)]
        assert it.queued >= 30
        waiting = held = 0
        while it.queued:
            loads = [view.load for view in it.router.instances()]
            waiting = max(waiting, *(load.waiting for load in loads))
            held = max(held, *(load.held_handoffs for load in loads))
            await asyncio.sleep(0.005)
        for answer in answers:
            assert len(await answer.tokens()) == 4
        assert waiting <= 15
        assert held <= 20
        await it.wait_idle()
