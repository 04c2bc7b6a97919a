"""Fakes for both ends of a link: a worker, a listener, and a transport without a network."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop

from penstock.link.client import LinkClient
from penstock.link.peer import Peer
from penstock.link.server import LinkServer
from penstock.link.settings import ClientSettings, ServerSettings, TlsSettings
from penstock.shapes import Attempt, Card, Load
from penstock.wire.frames import FrameDecoder, encode
from penstock.wire.messages import Bounce, Step
from tests import cards
from tests.builders import attempt
from tests.waiting import until


class FakeWorker:
    """A LinkHandler whose cache is a set of numbers."""

    def __init__(self, cached: Iterable[int] = ()) -> None:
        self.cached = set(cached)
        self.running = 0
        self.assets: dict[str, bytes] = {}
        self.generated: list[tuple[str, str]] = []
        self.cancelled: list[str] = []
        self.released: list[str] = []
        self.lost: list[Peer] = []
        self.epoch = 1

    def card(self) -> Card:
        return cards.card(epoch=self.epoch, total_blocks=2_000_000)

    def load(self) -> Load:
        return Load(running=self.running)

    def snapshot(self) -> tuple[Iterable[int], Load]:
        return self.cached, self.load()

    def asset(self, sha256: str) -> bytes | None:
        return self.assets.get(sha256)

    def on_generate(self, peer: Peer, attempt: Attempt) -> None:
        self.running += 1
        self.generated.append((peer.frontend_id, attempt.attempt_id))

    def on_cancel(self, peer: Peer, attempt_id: str) -> None:
        self.cancelled.append(attempt_id)

    def on_release(self, peer: Peer, handoff_id: str, sent: bool) -> None:
        self.released.append(handoff_id)

    def on_peer_lost(self, peer: Peer) -> None:
        self.lost.append(peer)


class FakeListener:
    """A LinkListener that writes down what it is told, and replays steps onto the snapshot."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.cached: set[int] = set()
        self.load = Load()
        self.steps: list[Step] = []

    def on_cached(self, hashes: list[int], *, first: bool) -> None:
        if first:
            self.cached = set()
        self.cached.update(hashes)

    def on_up(self, card: Card, load: Load) -> None:
        self.calls.append(("up", card))
        self.load = load

    def on_step(self, step: Step) -> None:
        self.steps.append(step)
        self.load = step.load
        self.cached -= set(step.removed)
        self.cached |= set(step.stored)

    def on_heartbeat(self, seen: int, load: Load) -> None:
        self.calls.append(("heartbeat", seen))
        self.load = load

    def on_bounce(self, bounce: Bounce) -> None:
        self.calls.append(("bounce", bounce.attempt_id))

    def on_draining(self, reason: str) -> None:
        self.calls.append(("draining", reason))

    def on_down(self, reason: str, orderly: bool) -> None:
        self.calls.append(("down", reason, orderly))

    @property
    def ups(self) -> int:
        return sum(call[0] == "up" for call in self.calls)

    @property
    def downs(self) -> list[str]:
        return [call[1] for call in self.calls if call[0] == "down"]


class FakeTransport(asyncio.Transport):
    """Keeps what is written; `stuck` leaves it unsent, as towards a peer that does not read."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self.protocol = protocol
        self.written = bytearray()
        self.unsent_bytes = 0
        self.stuck = False
        self.paused = False
        self.reading = True
        self.ending = ""
        self.high_bytes = 0

    def open(self) -> None:
        self.protocol.connection_made(self)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert high is not None
        self.high_bytes = high

    def get_write_buffer_size(self) -> int:
        return self.unsent_bytes

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("192.0.2.1", 4000) if name == "peername" else default

    def write(self, data: Any) -> None:
        assert not self.ending
        self.written += data
        if self.stuck:
            self.unsent_bytes += len(data)
            if self.unsent_bytes > self.high_bytes and not self.paused:
                self.paused = True
                self.protocol.pause_writing()

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def unstick(self) -> None:
        self.stuck = False
        self.unsent_bytes = 0
        if self.paused:
            self.paused = False
            self.protocol.resume_writing()

    def close(self) -> None:
        self._end("closed")

    def abort(self) -> None:
        self._end("aborted")

    def _end(self, how: str) -> None:
        if not self.ending:
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)
        self.ending = how

    def take(self, decode: Callable[[memoryview], Any]) -> list[Any]:
        """The messages written since the last call."""
        written, self.written = bytes(self.written), bytearray()
        return [decode(body) for body in FrameDecoder().feed(written)]

    def receive(self, message: Any) -> None:
        self.protocol.data_received(encode(message))


class LinkBench:
    """Servers and clients on loopback, all closed at the end of the test."""

    worker = staticmethod(FakeWorker)
    listener = staticmethod(FakeListener)
    transport = staticmethod(FakeTransport)
    until = staticmethod(until)
    attempt = staticmethod(attempt)

    @asynccontextmanager
    async def server(self, worker: FakeWorker, **settings: Any) -> AsyncIterator[LinkServer]:
        server = LinkServer(ServerSettings(**{"heartbeat_s": 0.05, **settings}), worker)
        await server.start()
        async with running(server.run()):
            try:
                yield server
            finally:
                await server.close("the test is over")

    @asynccontextmanager
    async def client(
        self, address: str, listener: FakeListener, frontend_id: str = "f1", **settings: Any
    ) -> AsyncIterator[LinkClient]:
        chosen = {"ping_s": 0.05, "retry_min_s": 0.01, "retry_max_s": 0.05, **settings}
        expected = chosen.pop("expected", None)
        client = LinkClient(
            address, listener, ClientSettings(**chosen), frontend_id=frontend_id, expected=expected
        )
        async with running(client.run()):
            yield client

    @asynccontextmanager
    async def client_of_tls(
        self,
        worker: FakeWorker,
        listener: FakeListener,
        worker_tls: TlsSettings | None,
        frontend_tls: TlsSettings | None,
    ) -> AsyncIterator[tuple[LinkServer, LinkClient]]:
        async with (
            self.server(worker, tls=worker_tls) as server,
            self.client(server.address, listener, tls=frontend_tls, handshake_timeout_s=0.3) as client,
        ):
            yield server, client


@asynccontextmanager
async def running(work: Awaitable[None]) -> AsyncIterator[None]:
    task = asyncio.ensure_future(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()


@pytest.fixture
def bench() -> LinkBench:
    return LinkBench()


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run each of these tests on both loops: they differ in how they buffer, close and report."""
    return {"asyncio": asyncio.SelectorEventLoop, "uvloop": uvloop.new_event_loop}
