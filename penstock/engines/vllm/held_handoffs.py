"""Tracks the KV that this engine keeps for decode workers. Only vLLM's processes know which KV has been
read or has expired. So they are asked periodically, and are told which KV no reader will pull.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from penstock.engines.vllm.differences import ask_all_ranks

if TYPE_CHECKING:
    from vllm.v1.engine.core_client import AsyncMPClient


class VllmHeldHandoffs:
    """The handoffs whose KV vLLM keeps.

    Args:
        interval_s: between two queries, while there are handoffs.
        on_fewer: called when handoffs have ended.
    """

    def __init__(self, client: AsyncMPClient, interval_s: float, on_fewer: Callable[[], None]) -> None:
        self._client = client
        self._interval_s = interval_s
        self._on_fewer = on_fewer
        self._core_ids: dict[str, str] = {}  # handoff id -> vLLM's id of the request whose KV it is
        self._unwanted: list[str] = []  # vLLM's ids of requests whose KV no reader will pull
        self._look = asyncio.Event()

    def __len__(self) -> int:
        return len(self._core_ids)

    def add(self, handoff_id: str, core_id: str) -> None:
        """Add a handoff that was sent to a frontend."""
        self._core_ids[handoff_id] = core_id

    def release(self, handoff_id: str, *, sent: bool) -> None:
        """Stop tracking a handoff that its frontend no longer needs. If it was sent to a decode worker,
        vLLM keeps the KV until it was read or its lease ends, but a stopping worker does not wait for that.
        Unknown ids are ignored."""
        core_id = self._core_ids.pop(handoff_id, None)
        if core_id is not None:
            if not sent:
                self.let_go(core_id)
            self._on_fewer()

    def let_go(self, core_id: str) -> None:
        """Have vLLM free the KV of a request that will not be handed over."""
        self._unwanted.append(core_id)
        self._look.set()

    async def look_after(self) -> None:
        """Query vLLM until cancelled. Raises EngineDeadError, and other errors that end an engine."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._look.wait(), self._interval_s)
            self._look.clear()
            if self._core_ids or self._unwanted:
                await self._ask()

    async def _ask(self) -> None:
        asked, unwanted = dict(self._core_ids), self._unwanted
        self._unwanted = []
        ranks = await ask_all_ranks(
            self._client, "collective_rpc", "penstock_held", None, (unwanted,), None
        )
        kept = {core_id for workers in ranks for worker in workers for core_id in worker}
        gone = [handoff_id for handoff_id, core_id in asked.items() if core_id not in kept]
        for handoff_id in gone:
            self._core_ids.pop(handoff_id, None)
        if gone:
            self._on_fewer()
