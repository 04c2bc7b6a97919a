"""Keys that wait: once each, one worker at a time, again after a failure."""

from __future__ import annotations

import asyncio

from penstock.clock import MonotonicClock, VirtualClock
from penstock.operator.work_queue import RETRY_MAX_S, WorkQueue


async def taken(queue: WorkQueue[str], clock: VirtualClock, within_s: float = 0.0) -> str | None:
    """What a worker gets at once, or in that time; None: nothing."""
    taking = asyncio.ensure_future(queue.take())
    await clock.advance(within_s)
    if taking.done():
        return taking.result()
    taking.cancel()
    await asyncio.gather(taking, return_exceptions=True)
    return None


async def test_a_key_that_was_added_often_is_worked_on_once() -> None:
    queue, clock = WorkQueue[str](clock := VirtualClock()), clock
    for _ in range(3):
        queue.add("a")
    assert await taken(queue, clock) == "a"
    queue.done("a")
    assert await taken(queue, clock) is None


async def test_what_is_added_while_it_is_worked_on_comes_again_but_not_at_the_same_time() -> None:
    clock = VirtualClock()
    queue = WorkQueue[str](clock)
    queue.add("a")
    assert await taken(queue, clock) == "a"
    queue.add("a")
    assert await taken(queue, clock) is None
    queue.done("a")
    assert await taken(queue, clock) == "a"


async def test_the_earliest_of_several_times_counts() -> None:
    clock = VirtualClock()
    queue = WorkQueue[str](clock)
    queue.add("a", 10)
    queue.add("a", 3)
    queue.add("a", 7)
    assert await taken(queue, clock, 2.9) is None
    assert await taken(queue, clock, 0.2) == "a"


async def test_a_worker_that_waits_is_woken_by_what_is_due_sooner() -> None:
    clock = VirtualClock()
    queue = WorkQueue[str](clock)
    queue.add("late", 100)
    taking = asyncio.ensure_future(queue.take())
    await clock.advance(1)
    queue.add("now")
    await clock.advance(0)
    assert taking.result() == "now"


async def test_pauses_after_failures_double_up_to_a_limit_and_end_with_a_success() -> None:
    clock = VirtualClock()
    queue = WorkQueue[str](clock)
    pauses = []
    for _ in range(12):
        queue.add("a")
        assert await taken(queue, clock) == "a"
        pauses.append(queue.failed("a"))
        await clock.advance(RETRY_MAX_S)
    assert pauses[0] < 0.3
    assert all(0.7 * RETRY_MAX_S < pause <= RETRY_MAX_S for pause in pauses[-2:])
    assert await taken(queue, clock) == "a"
    queue.done("a")
    queue.add("a")
    assert await taken(queue, clock) == "a"
    assert queue.failed("a") < 0.3


async def test_two_workers_share_the_keys() -> None:
    clock = VirtualClock()
    queue = WorkQueue[str](clock)
    first, second = asyncio.ensure_future(queue.take()), asyncio.ensure_future(queue.take())
    await clock.advance(0)
    queue.add("a")
    queue.add("b")
    await clock.advance(0)
    assert {first.result(), second.result()} == {"a", "b"}
    assert len(queue) == 0


async def test_a_worker_that_is_cancelled_at_any_moment_ends() -> None:
    """Also just when it wakes, and looks after what it waited with."""
    for steps in range(8):
        queue: WorkQueue[str] = WorkQueue(MonotonicClock())
        queue.add("later", 60)

        async def work(queue: WorkQueue[str] = queue) -> None:
            while True:
                queue.done(await queue.take())

        task = asyncio.create_task(work())
        await asyncio.sleep(0.01)
        queue.done("another")
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        ended, _ = await asyncio.wait([task], timeout=1)
        assert ended, f"goes on after {steps} steps"
