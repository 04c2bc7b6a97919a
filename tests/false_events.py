"""An engine whose cache events are wrong in a way that can be chosen, also while it runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec

from penstock.ports import EngineStep
from penstock.shapes import EngineCard

FAULTS = ("off", "other-hashes", "lost", "unseen-evictions")

_OTHER = 0x5A5A5A5A


class FalseEvents:
    """Stands before an engine. `fault`: one of FAULTS, or nothing; it then tells the truth.

    Args:
        claimed_block_size: what its card says in place of the truth.
    """

    def __init__(self, engine: Any, claimed_block_size: int | None = None) -> None:
        self.fault = ""
        self._engine = engine
        self._claimed_block_size = claimed_block_size
        self._told: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def start(self) -> EngineCard:
        card: EngineCard = await self._engine.start()
        if self._claimed_block_size is None:
            return card
        return msgspec.structs.replace(card, block_size=self._claimed_block_size)

    async def steps(self) -> AsyncIterator[EngineStep]:
        async for step in self._engine.steps():
            stored, removed = self._false(step.stored, step.removed)
            # Nothing that frontends would take for a lie: what was never told does not go.
            removed = [it for it in removed if it in self._told]
            self._told.difference_update(removed)
            self._told.update(stored)
            yield msgspec.structs.replace(step, stored=stored, removed=removed)

    def cached_hashes(self) -> Sequence[int]:
        return list(self._told)

    def _false(self, stored: list[int], removed: list[int]) -> tuple[list[int], list[int]]:
        match self.fault:
            case "off":
                return [], []
            case "other-hashes":
                return [it ^ _OTHER for it in stored], [it ^ _OTHER for it in removed]
            case "lost":
                return [it for it in stored if it % 4 == 0], removed
            case "unseen-evictions":
                return stored, []
        return stored, removed
