"""What an engine holds for decode workers. vLLM's workers are played here, to say things at awkward times;
checks/vllm/engine/handoffs.py has the real ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from penstock.engines.vllm.held_handoffs import VllmHeldHandoffs
from tests.waiting import until

INTERVAL_S = 0.02


class Workers:
    """Two ranks of two workers each, which answer when they are let."""

    core_engines = (0, 1)

    def __init__(self) -> None:
        self.kept: set[str] = set()
        self.unwanted: list[list[str]] = []  # as asked, time by time
        self.answering = asyncio.Event()
        self.answering.set()
        self.asking = asyncio.Event()

    async def _call_utility_async(
        self,
        method: str,
        rpc: str,
        timeout: float | None,
        args: tuple[list[str]],
        kwargs: Any,
        *,
        engine: int,
    ) -> list[list[str]]:
        assert (method, rpc, timeout, kwargs) == ("collective_rpc", "penstock_held", None, None)
        if engine == 0:
            self.unwanted.append(list(args[0]))
        kept = sorted(self.kept)  # as it is when they are asked
        self.asking.set()
        await self.answering.wait()
        return [[], kept[:1]] if engine == 0 else [kept[1:], []]


class Held:
    def __init__(self) -> None:
        self.workers = Workers()
        self.fewer = 0
        self.handoffs = VllmHeldHandoffs(self.workers, INTERVAL_S, self._on_fewer)  # type: ignore[arg-type]

    def _on_fewer(self) -> None:
        self.fewer += 1

    async def until(self, count: int) -> None:
        await until(lambda: len(self.handoffs) == count, look_s=0.001)


@asynccontextmanager
async def holding(*names: str) -> AsyncIterator[Held]:
    held = Held()
    for name in names:
        held.handoffs.add(name, f"core-{name}")
        held.workers.kept.add(f"core-{name}")
    looking = asyncio.create_task(held.handoffs.look_after())
    try:
        yield held
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)


async def test_what_no_rank_keeps_any_more_is_gone() -> None:
    async with holding("a", "b", "c") as held:
        await asyncio.sleep(3 * INTERVAL_S)
        assert len(held.handoffs) == 3
        held.workers.kept.remove("core-b")
        await held.until(2)
        assert held.fewer == 1


async def test_nobody_is_asked_while_nothing_is_held() -> None:
    async with holding() as held:
        await asyncio.sleep(5 * INTERVAL_S)
        assert held.workers.unwanted == []


async def test_a_release_is_told_at_once_and_once() -> None:
    async with holding("a", "b") as held:
        held.handoffs.release("a", sent=False)
        assert (len(held.handoffs), held.fewer) == (1, 1)
        held.handoffs.release("a", sent=False)
        held.handoffs.release("nobody", sent=False)
        held.handoffs.let_go("core-x")
        await held.workers.asking.wait()
        assert held.workers.unwanted[0] == ["core-a", "core-x"]
        await asyncio.sleep(3 * INTERVAL_S)
        assert held.workers.unwanted[1:] == [[]] * (len(held.workers.unwanted) - 1)
        assert held.fewer == 1


async def test_what_a_reader_was_told_of_is_kept_by_vllm_and_not_waited_for() -> None:
    async with holding("a", "b") as held:
        held.handoffs.release("a", sent=True)
        assert (len(held.handoffs), held.fewer) == (1, 1)
        await held.workers.asking.wait()
        await asyncio.sleep(3 * INTERVAL_S)
        assert held.workers.unwanted == [[]] * len(held.workers.unwanted)
        assert (len(held.handoffs), held.fewer) == (1, 1)


async def test_what_was_handed_out_while_the_workers_were_asked_is_not_taken_for_gone() -> None:
    async with holding("a") as held:
        held.workers.answering.clear()
        held.workers.asking.clear()
        await held.workers.asking.wait()
        held.handoffs.add("late", "core-late")
        held.handoffs.release("a", sent=False)
        held.workers.kept = {"core-late"}
        held.workers.answering.set()
        await asyncio.sleep(3 * INTERVAL_S)
        assert len(held.handoffs) == 1
        assert ["core-a"] in held.workers.unwanted


async def test_a_failure_ends_it() -> None:
    async def failing(*args: object, engine: int) -> None:
        raise ValueError("no")

    held = Held()
    held.workers._call_utility_async = failing  # type: ignore[method-assign, assignment]
    held.handoffs.let_go("core-a")
    with pytest.raises(ValueError, match="no"):
        await asyncio.wait_for(held.handoffs.look_after(), 5.0)
