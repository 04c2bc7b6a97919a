"""The network of the simulation: byte streams between processes, with all that can happen to them.

A stream is TCP as a program sees it: bytes arrive whole and in order, however the pieces are cut; what the
receiver does not read fills a window, and then the sender's buffer. Streams delay each other in no way, so
traffic overtakes between links and never within one. While a route is blocked, bytes wait for it, as
retransmissions do, and the end of a stream does not arrive: what is sent to a closed end later
is answered by a reset.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, cast

from penstock.errors import ProtocolError
from penstock.wire import frames
from penstock.wire.messages import ToWorker
from simulator.loop import Process, VirtualLoop, current_process

WINDOW_BYTES = 128 * 1024
"""Most that may be on its way, or received and not read. What is beyond it waits at the sender."""

SYN_RETRY_S = 1.0
"""Until a connection attempt over a blocked route is sent again."""

SLOW_READ_S = 0.05
"""A slow reader reads once in so many seconds."""

Route = tuple[str, str]
"""From host, to host."""


def first_message(data: bytes) -> ToWorker | None:
    """The first of the frames that a frontend writes; None when it is no message."""
    end = frames.LENGTH_BYTES + int.from_bytes(data[: frames.LENGTH_BYTES], "big")
    try:
        return frames.decode_to_worker(data[frames.LENGTH_BYTES : end])
    except ProtocolError:
        return None


class Network:
    """All routes and listeners.

    Args:
        rng: for delays, and for where streams are cut into pieces.
        note: called for everything that is delivered, connected and closed.
        latency_s: the shortest and the longest usual delay.
        cut_share: how many deliveries are cut in two.
    """

    def __init__(
        self,
        loop: VirtualLoop,
        rng: random.Random,
        note: Callable[..., None],
        latency_s: tuple[float, float] = (0.0001, 0.001),
        cut_share: float = 0.1,
    ) -> None:
        self.loop = loop
        self.rng = rng
        self.note = note
        self.cut_share = cut_share
        self.over = False  # nothing is carried any more
        self.slower_s: dict[Route, float] = {}  # spikes of delay
        self.taps: list[Callable[[Route, bytes], bytes]] = []  # see, and may change, what is written
        self.writer: End | None = None  # whose bytes they see
        self._latency_s = latency_s
        self._blocked: Counter[Route] = Counter()
        self._stuck: list[End] = []  # ends for which bytes wait until their route is open
        self._listeners: dict[tuple[str, int], StreamListener] = {}
        self._next_port = 1024
        self._ends: dict[End, None] = {}
        self._context = contextvars.copy_context()

    # --- faults -----------------------------------------------------------------------------------------

    def block(self, source: str, target: str) -> None:
        """Nothing arrives this way, until as many calls of `open`."""
        self._blocked[source, target] += 1

    def open(self, source: str, target: str) -> None:
        """What waits goes on."""
        self._blocked[source, target] -= 1
        if self._blocked[source, target]:
            return
        stuck, self._stuck = self._stuck, []
        for end in stuck:
            if end.route_in == (source, target):
                end.retransmit()
            else:
                self._stuck.append(end)

    def blocked(self, source: str, target: str) -> bool:
        """Whether nothing arrives this way."""
        return self._blocked[source, target] > 0

    def cut(self, one: str, other: str) -> None:
        """Reset all streams between two hosts, as a firewall that lost its state does."""
        for end in list(self._ends):
            if end.route_in == (one, other):
                end.reset()
                end.peer.reset()

    def killed(self, process: Process) -> None:
        """The system closes what a killed process had open."""
        for address in [key for key, it in self._listeners.items() if it.process is process]:
            del self._listeners[address]
        for end in [end for end in self._ends if end.process is process]:
            end.vanish()

    # --- what the event loop calls ------------------------------------------------------------------------

    def listen(self, factory: Callable[[], asyncio.Protocol], host: str, port: int) -> StreamListener:
        if not port:
            self._next_port += 1
            port = self._next_port
        if (host, port) in self._listeners:
            raise OSError(f"{host}:{port} is in use")
        listener = self._listeners[host, port] = StreamListener(
            self, current_process(), factory, host, port
        )
        return listener

    async def connect(
        self, factory: Callable[[], asyncio.Protocol], host: str, port: int
    ) -> tuple[asyncio.Transport, asyncio.Protocol]:
        process = current_process()
        await self._travel(process.name, host)
        listener = self._listeners.get((host, port))
        if listener is None or self.over:
            await self._travel(host, process.name)
            raise ConnectionRefusedError(f"{host}:{port} refuses")
        near, far = End(self, process, host), End(self, listener.process, process.name)
        near.peer, far.peer = far, near
        self._ends[near] = self._ends[far] = None
        far.process.soon(far.begin, listener.factory)
        try:
            await self._travel(host, process.name)
        except asyncio.CancelledError:
            near.abort()
            raise
        protocol = factory()
        if not near.closing:
            near.made(protocol)
        else:  # it was closed before this end knew of it
            raise ConnectionResetError(f"{host}:{port} hung up")
        return near, protocol

    async def _travel(self, source: str, target: str) -> None:
        while self.blocked(source, target):
            await asyncio.sleep(SYN_RETRY_S)
        await asyncio.sleep(self.delay_s(source, target))

    def delay_s(self, source: str, target: str) -> float:
        """Of what is sent now."""
        low, high = self._latency_s
        usual = low + (high - low) * self.rng.random()
        return usual + self.slower_s[source, target] if (source, target) in self.slower_s else usual

    def later(self, when: float, callback: Callable[..., object], *args: Any) -> None:
        """Something the network does, whatever the processes do."""
        self.loop.call_at(when, callback, *args, context=self._context)

    def wait_for_route(self, end: End) -> None:
        """Bytes for this end wait until its route is open."""
        if end not in self._stuck:
            self._stuck.append(end)

    def forget(self, end: End) -> None:
        """It is closed."""
        self._ends.pop(end, None)

    def unlisten(self, listener: StreamListener) -> None:
        """It listens no longer."""
        if self._listeners.get(listener.address) is listener:
            del self._listeners[listener.address]


class StreamListener:
    """What `create_server` returns, as far as it is used. It is its own only socket."""

    def __init__(
        self,
        network: Network,
        process: Process,
        factory: Callable[[], asyncio.Protocol],
        host: str,
        port: int,
    ) -> None:
        self.process = process
        self.factory = factory
        self.address = (host, port)
        self.sockets = [self]
        self._network = network

    def getsockname(self) -> tuple[str, int]:
        return self.address

    def close(self) -> None:
        self._network.unlisten(self)


class End(asyncio.Transport):
    """One end of a stream."""

    peer: End

    def __init__(self, network: Network, process: Process, peer_host: str) -> None:
        super().__init__({"peername": (peer_host, 0)})
        self.process = process
        self.closing = False
        self.route_in = (peer_host, process.name)
        self.route_out = (process.name, peer_host)
        self._network = network
        self._protocol: asyncio.Protocol | None = None
        self._unsent: deque[bytes] = deque()
        self._unsent_bytes = 0
        self._in_window = 0  # bytes that this end sent and its peer has not read
        self._last_arrival = 0.0
        self._waiting: deque[bytes | None] = deque()  # for their route; None: the end of the stream
        self._received: deque[bytes | None] = deque()
        self._reading = True
        self._delivering = False
        self._high, self._low = 64 * 1024, 16 * 1024
        self._writing_paused = False
        self._lost = False
        self.lied = False  # what it sent was changed to what nobody may say

    # --- the transport ------------------------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self.closing:
            return
        self._network.writer = self
        for tap in self._network.taps:
            data = tap(self.route_out, bytes(data))
        self._unsent.append(bytes(data))
        self._unsent_bytes += len(data)
        self._send()
        if self._unsent_bytes > self._high and not self._writing_paused:
            self._writing_paused = True
            cast(asyncio.Protocol, self._protocol).pause_writing()

    def get_write_buffer_size(self) -> int:
        return self._unsent_bytes

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = 64 * 1024 if high is None else high
        self._low = self._high // 4 if low is None else low

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        self._reading = True
        self._deliver_soon()

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            self._finish()

    def abort(self) -> None:
        if self._lost:
            return
        self._drop_unsent()
        self._tell_peer_reset()
        self._end(None)

    # --- sending ------------------------------------------------------------------------------------------

    def _send(self) -> None:
        while self._unsent and self._in_window < WINDOW_BYTES:
            piece = self._unsent.popleft()
            self._unsent_bytes -= len(piece)
            self._in_window += len(piece)
            self._carry(piece)
        if self._writing_paused and self._unsent_bytes <= self._low:
            self._writing_paused = False
            self.process.soon(cast(asyncio.Protocol, self._protocol).resume_writing)
        if self.closing and not self._unsent:
            self._finish()

    def _carry(self, piece: bytes | None) -> None:
        network = self._network
        if network.over:
            return
        arrival = network.loop.time() + network.delay_s(*self.route_out)
        self._last_arrival = max(arrival, self._last_arrival)
        network.later(self._last_arrival, self.peer.arrive, piece)

    def _finish(self) -> None:
        """Closed in order: once everything is sent, so is the end of the stream."""
        if not self._unsent and not self._lost:
            self._carry(None)
            self._end(None)

    def _tell_peer_reset(self) -> None:
        network = self._network
        if not network.over and not network.blocked(*self.route_out):
            network.later(network.loop.time() + network.delay_s(*self.route_out), self.peer.reset)

    # --- receiving ----------------------------------------------------------------------------------------

    def arrive(self, piece: bytes | None) -> None:
        """Bytes, or the end of the stream, come out of the network."""
        if self._waiting or self._network.blocked(*self.route_in):
            self._waiting.append(piece)
            self._network.wait_for_route(self)
        elif self._lost:
            self._tell_peer_reset()  # this end is closed
        else:
            self._received.append(piece)
            self._deliver_soon()

    def retransmit(self) -> None:
        """The route is open again."""
        waiting, self._waiting = self._waiting, deque()
        for piece in waiting:
            self.arrive(piece)

    def _deliver_soon(self) -> None:
        if self._received and self._reading and not self._delivering and self._protocol is not None:
            self._delivering = True
            speed = self.process.read_bytes_per_s
            if speed is None:
                self.process.soon(self._deliver, None)
            else:
                loop, most = self._network.loop, max(1, int(speed * SLOW_READ_S))
                loop.call_later(SLOW_READ_S, self._deliver, most, context=self.process.context)

    def _deliver(self, most: int | None) -> None:
        self._delivering = False
        if not self._received or not self._reading or self._lost:
            return
        piece = self._received.popleft()
        if piece is None:
            self.close()
            return
        while self._received and self._received[0] is not None:
            piece += self._received.popleft() or b""
        network = self._network
        if most is None and len(piece) > 1 and network.rng.random() < network.cut_share:
            most = network.rng.randrange(1, len(piece))
        if most is not None and most < len(piece):
            self._received.appendleft(piece[most:])
            piece = piece[:most]
        network.note("bytes", *self.route_in, len(piece))
        network.later(network.loop.time(), self.peer.read, len(piece))
        assert self._protocol is not None
        self._protocol.data_received(piece)
        self._deliver_soon()

    def read(self, count: int) -> None:
        """The peer has read this much."""
        self._in_window -= count
        if self._unsent and not self._lost:
            self._send()

    # --- beginning and end -------------------------------------------------------------------------------

    def begin(self, factory: Callable[[], asyncio.Protocol]) -> None:
        """Accepted by a listener."""
        if not self.closing:
            self.made(factory())

    def made(self, protocol: asyncio.Protocol) -> None:
        """From now on its protocol gets what arrives."""
        self._network.note("connected", *self.route_out)
        self._protocol = protocol
        protocol.connection_made(self)
        self._deliver_soon()

    def reset(self) -> None:
        """The peer is gone."""
        if not self._lost:
            self._drop_unsent()
            self._end(ConnectionResetError("reset by the peer"))

    def vanish(self) -> None:
        """Its process is gone, and gets no call any more."""
        self._drop_unsent()
        self.closing = self._lost = True
        self._network.forget(self)
        self._tell_peer_reset()

    def _drop_unsent(self) -> None:
        self._unsent.clear()
        self._unsent_bytes = 0

    def _end(self, error: Exception | None) -> None:
        self.closing = self._lost = True
        self._received.clear()
        self._network.note("closed", *self.route_out, error or "")
        self._network.forget(self)
        if self._protocol is not None:
            self.process.soon(self._protocol.connection_lost, error)
