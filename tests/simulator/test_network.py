from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from simulator.loop import Process, VirtualLoop
from simulator.network import WINDOW_BYTES, Network


class End(asyncio.Protocol):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.received = b""
        self.pieces = 0
        self.lost: list[Exception | None] = []
        self.paused = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        self.pieces += 1

    def connection_lost(self, error: Exception | None) -> None:
        self.lost.append(error)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False


class Pair:
    """A server `s`, a client `c`, and a stream between them."""

    def __init__(self) -> None:
        self.loop = VirtualLoop()
        self.network = self.loop.network = Network(self.loop, random.Random(1), lambda *event: None)
        self.server, self.client = Process(self.loop, "s"), Process(self.loop, "c")
        self.far, self.near = End(), End()

    async def connect(self) -> None:
        listening = await self.server.spawn(self.loop.create_server(lambda: self.far, "s", 0))
        port = listening.sockets[0].getsockname()[1]
        await self.client.spawn(self.loop.create_connection(lambda: self.near, "s", port))
        await asyncio.sleep(0.1)

    def write(self, data: bytes) -> None:
        self.client.soon(self.near.transport.write, data)


def told(story: Callable[[Pair], Coroutine[Any, Any, None]]) -> None:
    pair = Pair()

    async def whole() -> None:
        await pair.connect()
        await story(pair)

    pair.loop.run_until_complete(whole())
    pair.loop.close()


def test_bytes_arrive_in_order_in_any_pieces() -> None:
    async def story(pair: Pair) -> None:
        pair.network.cut_share = 0.9
        wanted = bytes(range(256)) * 4
        for start in range(0, len(wanted), 64):
            pair.write(wanted[start : start + 64])
        await asyncio.sleep(1.0)
        assert pair.far.received == wanted
        assert pair.far.pieces > 4
        pair.client.soon(pair.near.transport.close)
        await asyncio.sleep(1.0)
        assert pair.near.lost == pair.far.lost == [None]

    told(story)


def test_a_blocked_route_holds_bytes_back_and_a_reset_is_not_heard() -> None:
    async def story(pair: Pair) -> None:
        pair.network.block("c", "s")
        pair.write(b"late")
        await asyncio.sleep(10.0)
        assert pair.far.received == b""
        pair.network.open("c", "s")
        await asyncio.sleep(0.1)
        assert pair.far.received == b"late"
        pair.network.block("c", "s")
        pair.client.soon(pair.near.transport.abort)
        await asyncio.sleep(10.0)
        assert pair.far.lost == []
        pair.network.open("c", "s")
        pair.server.soon(pair.far.transport.write, b"anybody?")
        await asyncio.sleep(0.1)
        (error,) = pair.far.lost
        assert isinstance(error, ConnectionResetError)

    told(story)


def test_who_does_not_read_fills_a_window_and_then_the_sender() -> None:
    async def story(pair: Pair) -> None:
        pair.server.freeze()
        for _ in range(8):
            pair.write(bytes(WINDOW_BYTES // 4))
        await asyncio.sleep(1.0)
        assert pair.near.transport.get_write_buffer_size() == WINDOW_BYTES
        assert pair.near.paused
        pair.server.thaw()
        await asyncio.sleep(1.0)
        assert len(pair.far.received) == 2 * WINDOW_BYTES
        assert not pair.near.paused

    told(story)


def test_a_killed_process_is_heard_of_and_refuses() -> None:
    async def story(pair: Pair) -> None:
        pair.server.dead = True
        pair.network.killed(pair.server)
        await asyncio.sleep(0.1)
        (error,) = pair.near.lost
        assert isinstance(error, ConnectionResetError)
        with pytest.raises(ConnectionRefusedError):
            await pair.client.spawn(pair.loop.create_connection(End, "s", 1025))

    told(story)
