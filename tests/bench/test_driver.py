"""Closed and open loops against a server on the loopback."""

import asyncio
from itertools import islice
from typing import Any

import pytest

from penstock.bench.conversations import (
    Arrival,
    PlannedConversation,
    PlannedTurn,
    Rate,
    Shape,
    arrivals,
    synthetic,
)
from penstock.bench.driver import Driver, Limits, Payload
from penstock.bench.http_client import HttpClient
from penstock.bench.measurements import BenchReport, Measurements


async def run_closed(server: Any, limits: Limits, *, turns: int = 1, concurrency: int = 4) -> BenchReport:
    client = HttpClient(server.url)
    driver = Driver(client, Payload("tiny"), limits, Measurements())
    await driver.closed(synthetic(Shape(turns=turns, output_tokens=5), 0), concurrency)
    await client.close()
    assert driver.in_flight == 0
    return driver.report()


async def test_a_closed_loop_sends_exactly_the_requests(completion_server: Any) -> None:
    async with completion_server(gap_s=0.002, first_s=0.01) as server:
        report = await run_closed(server, Limits(requests=20))
    assert (report.ok, report.failed, len(server.requests)) == (20, 0, 20)
    assert server.connections == 4
    assert report.output_tokens == 100
    assert report.cached_share == 0.5
    assert report.ttft_ms.p50 is not None
    assert 9.0 < report.ttft_ms.p50 < 500.0
    assert report.itl_ms.p50 is not None
    assert 1.5 < report.itl_ms.p50 < 100.0
    request = server.requests[0]
    assert (request["model"], request["max_tokens"], request["stream"]) == ("tiny", 5, True)
    assert request["stream_options"] == {"include_usage": True}
    assert "ignore_eos" not in request


async def test_a_conversation_keeps_its_history(completion_server: Any) -> None:
    async with completion_server() as server:
        report = await run_closed(server, Limits(requests=3), turns=3, concurrency=1)
    assert report.ok == 3
    assert [len(request["messages"]) for request in server.requests] == [1, 3, 5]
    last = server.requests[-1]["messages"]
    assert [message["role"] for message in last] == ["user", "assistant", "user", "assistant", "user"]
    assert last[1]["content"] == "t0 t1 t2 t3 t4 "


async def test_failures_are_counted_by_kind(completion_server: Any) -> None:
    trouble = {1: "429", 2: "cut", 3: "error", 4: "truncated", 5: "hang"}
    async with completion_server(trouble=trouble) as server:
        report = await run_closed(server, Limits(requests=8, request_timeout_s=0.2), concurrency=1)
    assert report.ok == 3
    assert report.errors == dict.fromkeys(
        ("http 429", "disconnected", "stream error", "truncated", "timeout"), 1
    )
    assert "busy" in report.examples["http 429"]
    assert report.examples["stream error"] == "engine died"


async def test_a_failed_turn_ends_its_conversation(completion_server: Any) -> None:
    async with completion_server(trouble={2: "cut"}) as server:
        report = await run_closed(server, Limits(requests=4), turns=3, concurrency=1)
    assert (report.ok, report.failed) == (3, 1)
    assert [len(request["messages"]) for request in server.requests] == [1, 3, 1, 3]


async def test_the_duration_stops_sending_and_the_drain_stops_waiting(completion_server: Any) -> None:
    async with completion_server(trouble={3: "hang"}) as server:
        limits = Limits(duration_s=0.1, drain_s=0.1)
        async with asyncio.timeout(5):
            report = await run_closed(server, limits, concurrency=2)
    assert report.errors == {"unfinished": 1}
    assert report.ok >= 2


async def test_an_open_loop_does_not_wait_for_answers(completion_server: Any) -> None:
    async with completion_server(first_s=0.2) as server:
        client = HttpClient(server.url)
        driver = Driver(client, Payload("tiny", ignore_eos=True), Limits(requests=20), Measurements())
        load = arrivals(synthetic(Shape(), 0), Rate(200.0, poisson=False), 0)
        await driver.open(load)
        await client.close()
    assert driver.report().ok == 20
    assert server.connections > 10, "most were in flight together"
    assert server.requests[0]["ignore_eos"] is True


async def test_an_open_loop_ends_with_its_arrivals_or_its_duration(completion_server: Any) -> None:
    for limits, expected in ((Limits(), 3), (Limits(duration_s=0.05), 2)):
        async with completion_server() as server:
            client = HttpClient(server.url)
            driver = Driver(client, Payload("tiny"), limits, Measurements())
            conversation = PlannedConversation([PlannedTurn("hello", 5)])
            await driver.open(Arrival(at_s, conversation) for at_s in (0.0, 0.02, 0.15))
            await client.close()
        assert driver.report().ok == expected


async def test_too_many_in_flight_are_not_sent(completion_server: Any) -> None:
    async with completion_server(first_s=0.1) as server:
        client = HttpClient(server.url)
        driver = Driver(client, Payload("tiny"), Limits(max_in_flight=2), Measurements())
        conversation = PlannedConversation([PlannedTurn("hello", 5)])
        await driver.open(Arrival(0.001 * number, conversation) for number in range(5))
        await client.close()
    assert driver.report().errors == {"too many in flight": 3}
    assert driver.report().ok == 2


async def test_a_bug_in_the_workload_is_not_hidden(completion_server: Any) -> None:
    def broken() -> Any:
        yield from islice(synthetic(Shape(), 0), 1)
        raise ValueError("bug")

    async with completion_server() as server:
        client = HttpClient(server.url)
        driver = Driver(client, Payload("tiny"), Limits(requests=9), Measurements())
        with pytest.raises(ExceptionGroup):
            await driver.closed(broken(), 1)
        await client.close()
