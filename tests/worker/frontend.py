"""The other end of a worker's link, for tests."""

from __future__ import annotations

import asyncio

from penstock.link.client import LinkClient
from penstock.link.settings import ClientSettings
from penstock.shapes import Card, Load
from penstock.wire.messages import Bounce, Step


class Frontend:
    """The other end of the link, which keeps what it hears."""

    def __init__(self, address: str, name: str) -> None:
        self.cards: list[Card] = []
        self.hashes: list[int] = []
        self.steps: list[Step] = []
        self.heartbeats: list[tuple[int, Load]] = []
        self.bounces: list[Bounce] = []
        self.draining = False
        self.downs: list[str] = []
        self.client = LinkClient(address, self, ClientSettings(), frontend_id=name)
        self.task = asyncio.create_task(self.client.run())

    def on_cached(self, hashes: list[int], *, first: bool) -> None:
        self.hashes = hashes if first else self.hashes + hashes

    def on_up(self, card: Card, load: Load) -> None:
        self.cards.append(card)

    def on_step(self, step: Step) -> None:
        self.steps.append(step)

    def on_heartbeat(self, seen: int, load: Load) -> None:
        self.heartbeats.append((seen, load))

    def on_bounce(self, bounce: Bounce) -> None:
        self.bounces.append(bounce)

    def on_draining(self, reason: str) -> None:
        self.draining = True

    def on_down(self, reason: str, orderly: bool) -> None:
        self.downs.append(reason)

    async def hang_up(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
