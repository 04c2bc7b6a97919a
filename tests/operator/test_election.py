"""Who acts, by a Lease: one at a time, whatever fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from penstock.clock import VirtualClock
from penstock.kubernetes.api import ApiError
from penstock.kubernetes.kinds import LEASES
from penstock.operator.election import Election, ElectionSettings
from tests.kubernetes_double import KubernetesDouble


def candidate(api: KubernetesDouble, clock: VirtualClock, name: str) -> Election:
    return Election(api, ElectionSettings(namespace="ns", name="lease", identity=name), clock)


@asynccontextmanager
async def running(*elections: Election) -> AsyncIterator[list[asyncio.Task[None]]]:
    tasks = [asyncio.create_task(election.run()) for election in elections]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_the_first_one_leads_and_the_other_stands_by() -> None:
    api, clock = KubernetesDouble(), VirtualClock()
    first, second = candidate(api, clock, "a"), candidate(api, clock, "b")
    async with running(first, second):
        await clock.advance(60)
        assert (first.leads, second.leads) == (True, False)
        lease = await api.get(LEASES, "lease", "ns")
        assert lease["spec"]["holderIdentity"] == "a"
        assert lease["spec"]["leaseTransitions"] == 0


async def test_a_dead_leader_is_followed_after_the_lease_and_not_before() -> None:
    api, clock = KubernetesDouble(), VirtualClock()
    first, second = candidate(api, clock, "a"), candidate(api, clock, "b")
    async with running(first):
        await clock.advance(1)
    async with running(second):
        await clock.advance(8)
        assert (first.leads, second.leads) == (True, False)  # for all that `first` knows
        await clock.advance(10)
        assert (first.leads, second.leads) == (False, True)
        assert (await api.get(LEASES, "lease", "ns"))["spec"]["leaseTransitions"] == 1


async def test_one_that_resigns_is_followed_at_once() -> None:
    api, clock = KubernetesDouble(), VirtualClock()
    first, second = candidate(api, clock, "a"), candidate(api, clock, "b")
    async with running(first):
        await clock.advance(1)
    await first.resign()
    assert not first.leads
    async with running(second):
        await clock.advance(3)
        assert second.leads


async def test_a_leader_that_cannot_write_stops_acting_before_another_may_and_then_ends() -> None:
    api, clock = KubernetesDouble(), VirtualClock()
    first = candidate(api, clock, "a")
    async with running(first) as tasks:
        await clock.advance(1)
        assert first.leads
        api.disconnect()
        await clock.advance(8)
        assert first.leads
        await clock.advance(5)
        assert not first.leads
        assert tasks[0].done()


async def test_a_short_outage_costs_nobody_the_lease() -> None:
    api, clock = KubernetesDouble(), VirtualClock()
    first = candidate(api, clock, "a")
    async with running(first) as tasks:
        await clock.advance(1)
        api.disconnect()
        await clock.advance(6)
        api.connect()
        await clock.advance(60)
        assert first.leads
        assert not tasks[0].done()


async def test_of_two_that_write_at_once_one_wins() -> None:
    api, clock = KubernetesDouble(), VirtualClock()
    api.fail_next("create", ApiError("exists", 409, "AlreadyExists"))
    first = candidate(api, clock, "a")
    async with running(first):
        await clock.advance(1)
        assert not first.leads
        await clock.advance(3)
        assert first.leads


async def test_one_from_whom_the_lease_is_taken_before_its_time_ends_at_the_next_look() -> None:
    api, clock = KubernetesDouble(), VirtualClock()
    first = candidate(api, clock, "a")
    async with running(first) as tasks:
        await clock.advance(5)
        assert first.leads
        await api.patch(LEASES, "lease", {"spec": {"holderIdentity": "b"}}, "ns")
        await clock.advance(2.5)
        assert not first.leads
        assert tasks[0].done()
        assert (await api.get(LEASES, "lease", "ns"))["spec"]["holderIdentity"] == "b"
