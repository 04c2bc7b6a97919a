"""Overload, through the router and real workers: who waits, who goes first, who is sent away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from penstock.core.admission import AdmissionSettings
from penstock.core.room import waiting_bytes
from penstock.core.settings import RouterSettings
from penstock.errors import Rejection, RequestRejected
from penstock.shapes import Rates, Request, Role, Sampling
from tests.cluster import WAIT_S, Answer, Cluster, cluster

ONE = {"a0": Role.AGGREGATED}
PROMPT = list(range(100))
SLOW = {"cost_model": "qwen3-32b/h200/tp2", "speedup": 4.0}  # about 3 ms a step
ONE_PLACE = {**SLOW, "scheduler": {"max_running": 1}}
LONG = 3900  # tokens that outlast a test


def limits(**admission: float) -> RouterSettings:
    return RouterSettings(tick_s=0.02, admission=AdmissionSettings(**admission))  # type: ignore[arg-type]


def request_of(token_ids: list[int]) -> Request:
    return Request("r", "sim", "", token_ids, Sampling(max_tokens=8))


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


def order_of(answers: dict[str, Answer]) -> list[str]:
    """Watch in which order they end."""
    order: list[str] = []

    def note(name: str, answer: Answer) -> None:
        end = answer.done.set

        def set_and_note() -> None:
            order.append(name)
            end()

        answer.done.set = set_and_note  # type: ignore[method-assign]

    for name, answer in answers.items():
        note(name, answer)
    return order


async def test_those_that_wait_go_by_priority_and_by_turns(tmp_path: Path) -> None:
    async with cluster(tmp_path, ONE, limits(), sim=ONE_PLACE) as it:
        ticket = await occupy(it)
        answers = {}
        for name, tenant, priority in (
            ("late", "a", 1),
            ("a1", "a", 0),
            ("a2", "a", 0),
            ("a3", "a", 0),
            ("b1", "b", 0),
            ("first", "b", -1),
        ):
            answers[name], _ = it.ask(PROMPT, max_tokens=2, tenant=tenant, priority=priority)
        assert it.queued == 7
        order = order_of(answers)
        ticket.cancel()
        for answer in answers.values():
            assert len(await answer.tokens()) == 2
    assert order[0] == "first"
    assert order[-1] == "late"
    assert order.index("b1") <= 2
    assert [name for name in order if name[0] == "a"] == ["a1", "a2", "a3"]


async def test_a_client_that_leaves_gives_its_place_away(tmp_path: Path) -> None:
    async with cluster(tmp_path, ONE, limits(max_queued=6), sim=ONE_PLACE) as it:
        running = await occupy(it)
        waiting = [it.ask(PROMPT) for _ in range(2)]
        with pytest.raises(RequestRejected):
            it.ask(PROMPT)
        waiting[0][1].cancel()
        waiting[0][1].cancel()
        assert it.queued == 2
        last, _ = it.ask(PROMPT)
        running.cancel()
        assert len(await waiting[1][0].tokens()) == 8
        assert len(await last.tokens()) == 8
        assert not waiting[0][0].done.is_set()
        await it.wait_idle()
        assert it.queued == 0


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
        assert f"bound_ms=3000 place={it.queued}" in refused.message
        with pytest.raises(RequestRejected):
            it.router.check("sim", "", 0)
        it.router.check("sim", "", -1)
        it.router.check("sim", "other", 0)
        exposition = it.metrics.render().decode()
        assert 'penstock_rejected_total{reason="wait"} 2.0' in exposition
        assert f'penstock_queued{{model="sim"}} {float(it.queued)}' in exposition
        assert 'penstock_saturation_ms{model="sim"}' in exposition
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


async def test_who_was_let_in_is_not_sent_away(tmp_path: Path) -> None:
    """However wrong the prediction was: it waits for its turn."""
    async with cluster(tmp_path, ONE, limits(max_wait_ms=1000.0), sim=ONE_PLACE) as it:
        running = await occupy(it)  # predicted to end sooner than it does
        answer, _ = it.ask(PROMPT)
        await asyncio.sleep(1.5)
        running.cancel()
        assert len(await answer.tokens()) == 8


async def test_a_freeze_of_the_frontend_is_no_measure_of_the_workers(tmp_path: Path) -> None:
    async with cluster(tmp_path, ONE, limits(max_wait_ms=60_000.0), sim=ONE_PLACE) as it:
        running = await occupy(it)
        answers = [it.ask(PROMPT)[0] for _ in range(10)]
        time.sleep(5.0)  # noqa: ASYNC251
        running.cancel()
        for answer in answers:
            assert len(await answer.tokens()) == 8
        (queue,) = it.router._queues.values()
        assert queue._drain._ms < 4_000.0


async def test_the_choices_of_a_call_are_admitted_together(tmp_path: Path) -> None:
    async with cluster(tmp_path, ONE, limits(), sim=ONE_PLACE) as it:
        running = await occupy(it)
        first, _ = it.ask(PROMPT, seed=7)
        three = [it.ask(PROMPT, call_id="three", seed=seed, priority=-1)[0] for seed in range(3)]
        order = order_of({"first": first, **{f"three-{n}": answer for n, answer in enumerate(three)}})
        assert it.queued == 5
        running.cancel()
        for answer in (first, *three):
            assert len(await answer.tokens()) == 8
    assert order[-1] == "first"


async def test_deadlines_begin_when_the_frontend_has_the_request(tmp_path: Path) -> None:
    async with cluster(tmp_path, {}, limits()) as it:
        for age_s, kind in ((31.0, Rejection.UNAVAILABLE), (1801.0, Rejection.TIMED_OUT)):
            answer, _ = it.ask(PROMPT, age_s=age_s, revision="of before")
            with pytest.raises(RequestRejected) as raised:
                await answer.tokens()
            assert raised.value.kind is kind


async def test_a_worker_that_bounces_is_left_alone_for_a_while(tmp_path: Path) -> None:
    """And a bounced request keeps its place at the head."""
    one_place = {**ONE_PLACE, "total_blocks": 2048}
    async with cluster(
        tmp_path, ONE, limits(dispatch_wait_ms=9e9, max_wait_ms=9e9), sim=one_place, max_waiting=1
    ) as it:
        answer, running = it.ask(PROMPT, max_tokens=LONG)
        await answer.wait_tokens(1)
        answers = {f"r{number}": it.ask(PROMPT, max_tokens=2)[0] for number in range(6)}
        order = order_of(answers)
        began = asyncio.get_running_loop().time()
        await asyncio.sleep(0.7)
        rounds = 2 + (asyncio.get_running_loop().time() - began) / 0.25
        bounces = [
            float(line.split()[-1])
            for line in it.metrics.render().decode().splitlines()
            if line.startswith("penstock_bounces_total")
        ]
        assert 5 <= sum(bounces) <= 5 * rounds  # 5 of 6 at once, and again every 250 ms
        running.cancel()
        for answer in answers.values():
            assert len(await answer.tokens()) == 2
        assert order == sorted(order)


async def test_requests_of_a_lost_worker_go_before_those_that_wait(tmp_path: Path) -> None:
    roles = {"a0": Role.AGGREGATED, "a1": Role.AGGREGATED}
    async with cluster(tmp_path, roles, limits(), sim=ONE_PLACE) as it:
        first, _ = it.ask(PROMPT, max_tokens=600)
        second, _ = it.ask([7, *PROMPT], max_tokens=600)
        await first.wait_tokens(1)
        await second.wait_tokens(1)
        answers = {f"r{number}": it.ask(PROMPT, max_tokens=2)[0] for number in range(8)}
        order = order_of({"first": first, "second": second, **answers})
        await until(lambda: it.queued > 0)
        await it.workers["a0"].die()
        for answer in (first, second, *answers.values()):
            await answer.tokens()
        assert set(order[-3:]) <= set(answers)


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
