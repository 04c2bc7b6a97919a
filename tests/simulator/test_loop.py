from __future__ import annotations

import asyncio

import pytest

from simulator.loop import Process, StandsStill, VirtualLoop


def test_time_jumps_to_the_next_timer() -> None:
    loop = VirtualLoop()
    loop.run_until_complete(asyncio.sleep(3600.0))
    assert loop.time() == 3600.0
    loop.close()


def test_a_frozen_process_catches_up_late_and_in_order() -> None:
    loop = VirtualLoop()
    process = Process(loop, "p")
    seen: list[tuple[str, float]] = []

    async def count() -> None:
        for number in range(4):
            seen.append((str(number), loop.time()))
            await asyncio.sleep(1.0)

    async def story() -> None:
        counting = process.spawn(count())
        await asyncio.sleep(1.5)
        process.freeze()
        process.soon(seen.append, ("called", 0.0))
        await asyncio.sleep(3.0)
        assert len(seen) == 2
        process.thaw()
        await counting
        assert process.running_tasks() == []

    loop.run_until_complete(story())
    assert seen == [("0", 0.0), ("1", 1.0), ("called", 0.0), ("2", 4.5), ("3", 5.5)]
    loop.close()


def test_a_timeout_is_kept() -> None:
    loop = VirtualLoop()

    async def story() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2.0):
                await asyncio.sleep(5.0)

    loop.run_until_complete(story())
    assert loop.time() == 2.0
    loop.close()


def test_callbacks_take_time() -> None:
    loop = VirtualLoop(callback_s=0.5)
    order: list[str] = []
    loop.call_at(0.75, order.append, "timer")

    async def story() -> None:
        for _ in range(4):
            order.append("step")
            await asyncio.sleep(0)

    loop.run_until_complete(story())
    assert order.index("timer") < 4  # not only when all steps are done
    loop.close()


def test_standing_still_is_an_error() -> None:
    loop = VirtualLoop()

    async def wait() -> None:
        await asyncio.Event().wait()

    waiting = loop.create_task(wait())
    with pytest.raises(StandsStill, match="nothing is left"):
        loop.run_until_complete(waiting)
    waiting.cancel()

    async def turn() -> None:
        while True:
            await asyncio.sleep(0)

    turning = loop.create_task(turn())
    with pytest.raises(StandsStill, match="callbacks at"):
        loop.run_until_complete(turning)
    loop.forgive()
    turning.cancel()
    loop.run_until_complete(asyncio.wait([waiting, turning]))
    loop.close()
