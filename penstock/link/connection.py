"""One connection: whole frames in, whole frames out, and one end with one reason.

What a frame means is its owner's business (peer.py on a worker, session.py on a frontend). Nothing here
waits: a write that the network does not take is buffered up to a limit, and beyond it the connection is
cut. Time comes in as ticks from the owner, so that a process that was itself held up (a debugger, a long
garbage collection) counts one tick and does not blame its peers for the silence.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import ParamSpec, Protocol, cast

from penstock.errors import ProtocolError
from penstock.net.address import join_address
from penstock.wire.frames import FrameDecoder

_HIGH_WATER_BYTES = 256 * 1024
"""Paced frames stop while more than this is unsent, so that a token waits behind little of them."""


_logger = logging.getLogger(__name__)
_P = ParamSpec("_P")


class ConnectionOwner(Protocol):
    """What a connection tells its owner."""

    def opened(self) -> None:
        """The connection may be written to."""

    def received(self, body: memoryview) -> None:
        """A frame's body; it may be read only during this call. What is raised here ends the connection."""

    def ended(self, reason: str) -> None:
        """The last call, exactly once after `opened`."""


class Connection(asyncio.Protocol):
    """Frames over one transport.

    Args:
        owner: told what happens.
        max_frame_bytes: longest body that may arrive now; the owner may change it (`limit_frames`).
        max_unsent_bytes: most that may wait for the network.
    """

    def __init__(self, owner: ConnectionOwner, max_frame_bytes: int, max_unsent_bytes: int) -> None:
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.received_bytes = 0  # as they come out of TLS, if there is any
        self.silent_s = 0.0  # ticked since the last bytes arrived
        self.phase_s = 0.0  # ticked since the owner last set it to 0
        self.misled = False  # it was cut because the peer said what no peer may say
        self._owner = owner
        self._decoder = FrameDecoder(max_frame_bytes)
        self._max_unsent_bytes = max_unsent_bytes
        self._transport: asyncio.Transport | None = None
        self._peer: tuple[str, int] | tuple[()] = ()
        self._reason = ""  # why it is ending; empty while it is not
        self._paced: deque[Iterator[bytes]] = deque()
        self._paused = False
        self._pump_scheduled = False
        self._resting = False

    @property
    def usable(self) -> bool:
        """Whether what is written now has a chance to arrive."""
        return self._open() is not None

    @property
    def unsent_bytes(self) -> int:
        """Written, and not yet taken by the network."""
        transport = self._open()
        return transport.get_write_buffer_size() if transport is not None else 0

    @property
    def peer_address(self) -> str:
        """Where the other end is, for the log."""
        return join_address(*self._peer) if self._peer else "unknown"

    def limit_frames(self, max_frame_bytes: int) -> None:
        """Change the longest body that may arrive."""
        self._decoder.max_frame_bytes = max_frame_bytes

    def tick(self, seconds: float) -> None:
        """Let time pass."""
        self.silent_s += seconds
        self.phase_s += seconds

    def write(self, frame: bytes) -> None:
        """Send a frame; cut the connection when too much is unsent. Nothing happens once it is ending."""
        transport = self._open()
        if transport is not None:
            transport.write(frame)
            self.check_unsent(0)

    def has_room(self, size: int) -> bool:
        """Whether so many bytes may be written now, with room left for what cannot wait."""
        transport = self._open()
        unsent_bytes = 0 if transport is None else transport.get_write_buffer_size()
        return unsent_bytes == 0 or unsent_bytes + size <= self._max_unsent_bytes * 7 // 8

    def check_unsent(self, held_bytes: int) -> None:
        """Cut the connection when the unsent bytes, and those the owner holds back, are too many."""
        transport = self._open()
        if transport is not None:
            unsent_bytes = transport.get_write_buffer_size() + held_bytes
            if unsent_bytes > self._max_unsent_bytes:
                self.cut(f"it does not read: {unsent_bytes} bytes unsent")

    def write_paced(self, frames: Iterator[bytes]) -> None:
        """Send frames one per turn of the event loop, and only as the network takes them; what `write`
        sends goes in between. Several such series go one after the other."""
        self._paced.append(frames)
        self._schedule_pump()

    def rest(self) -> None:
        """Read on in the next turn of the event loop. Otherwise a peer that sends fast is read for as long
        as it does, and a large snapshot holds up everyone else's tokens."""
        transport = self._open()
        if transport is not None and not self._resting:
            self._resting = True
            transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._read_on)

    def close(self, reason: str) -> None:
        """End in order: what was written still leaves, as far as the peer reads it. The owner sets the
        deadline, with `cut`."""
        transport = self._open()
        if transport is not None:
            self._reason = reason
            transport.close()

    def cut(self, reason: str) -> None:
        """End at once, dropping what is unsent. After `close` it keeps that reason."""
        self._reason = self._reason or reason
        if self._transport is not None:
            self._transport.abort()

    def guard(self, call: Callable[_P, None], *args: _P.args, **options: _P.kwargs) -> None:
        """Do something for this connection. What it raises ends this connection and nothing else: a
        ProtocolError is the peer's fault, anything else a defect of ours, which is logged in full."""
        try:
            call(*args, **options)
        except ProtocolError as error:
            self.misled = True
            self.cut(str(error))
        except Exception as error:
            _logger.exception(
                "the link with %s ends because of an error in this process", self.peer_address
            )
            self.cut(f"an error in this process: {error!r}")

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._peer = (transport.get_extra_info("peername") or ())[:2]  # a closed one may no longer know
        self._transport.set_write_buffer_limits(high=_HIGH_WATER_BYTES)
        self._owner.opened()

    def data_received(self, received: bytes) -> None:
        self.silent_s = 0.0
        self.received_bytes += len(received)
        self.guard(self._take, received)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._schedule_pump()

    def connection_lost(self, error: Exception | None) -> None:
        lost = f"connection lost: {error}" if error else "closed by the other side"
        self._reason = self._reason or lost
        self._paced.clear()
        self.guard(self._owner.ended, self._reason)
        if not self.ended.cancelled():
            self.ended.set_result(self._reason)

    def _take(self, received: bytes) -> None:
        if self._reason:
            return
        for body in self._decoder.feed(received):
            self._owner.received(body)
            if self._reason:
                return

    def _open(self) -> asyncio.Transport | None:
        return None if self._reason else self._transport

    def _read_on(self) -> None:
        self._resting = False
        transport = self._open()
        if transport is not None:
            transport.resume_reading()

    def _schedule_pump(self) -> None:
        if self._paced and not self._paused and not self._pump_scheduled:
            self._pump_scheduled = True
            asyncio.get_running_loop().call_soon(self.guard, self._pump)

    def _pump(self) -> None:
        self._pump_scheduled = False
        if not self._paced or self._paused or self._reason:
            return
        frame = next(self._paced[0], None)
        if frame is None:
            self._paced.popleft()
        else:
            self.write(frame)
        self._schedule_pump()
