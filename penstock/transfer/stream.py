"""A TCP connection with deadlines, for messages and pool rows.

The socket blocks, and before each call its timeout is set to the time that is left. So one system call
moves megabytes (MSG_WAITALL). A non-blocking socket would wake for every segment and take twice as long.
Deadlines are of `time.monotonic`.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator

from penstock.errors import RemoteError
from penstock.transfer.messages import LENGTH_BYTES, M, Message, check_length, frame, parsed

_WINDOW_BYTES = 4 * 1024 * 1024  # per system call: the deadline is checked in between
_WINDOW_VIEWS = 1024  # IOV_MAX of Linux and macOS
_MORE = getattr(socket, "MSG_MORE", 0)  # Linux: wait for the bytes that follow before sending a segment


class ConnectionLost(RemoteError):
    """The other end closed the connection, or the connection failed."""


class DeadlinePassed(RemoteError):
    """The other end did not answer before the deadline."""


class Stream:
    """One connection. Only `cut` may be called while another thread uses it.

    Args:
        connected: a TCP socket, which the stream owns from now on. It is closed if this raises.

    Raises:
        ConnectionLost: the connection has been reset already.
    """

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        try:
            connected.setblocking(True)
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            connected.close()
            raise _lost(error) from error

    def send(self, message: Message, deadline: float, *, more: bool = False) -> None:
        """Send a message. With `more`, it may wait to share a segment with the bytes that are sent next."""
        self._send_all([memoryview(frame(message))], deadline, _MORE if more else 0)

    def receive(self, kind: type[M], deadline: float) -> M:
        """Receive the next message, which must be of this kind.

        Raises:
            ProtocolError: it is of another kind, or invalid.
        """
        length = int.from_bytes(self._receive_bytes(LENGTH_BYTES, deadline), "big")
        check_length(length)
        return parsed(kind, self._receive_bytes(length, deadline))

    def send_rows(self, rows: list[memoryview], deadline: float) -> None:
        """Send these rows. They may wait to share a segment with the message that follows."""
        self._send_all(rows, deadline, _MORE)

    def receive_rows(self, rows: list[memoryview], deadline: float) -> None:
        """Fill these rows from the connection."""
        self._move(self._receive_some, socket.SO_RCVTIMEO, rows, deadline)

    def is_stale(self) -> bool:
        """Whether an idle connection was closed by the other end, or has received unexpected bytes."""
        try:
            self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def cut(self) -> None:
        """End the connection while another thread uses it. That thread's call raises ConnectionLost."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the connection has already ended

    def close(self) -> None:
        self._socket.close()

    def _receive_bytes(self, count: int, deadline: float) -> bytes:
        data = bytearray(count)
        self.receive_rows([memoryview(data)], deadline)
        return bytes(data)

    def _receive_some(self, views: list[memoryview]) -> int:
        return self._socket.recvmsg_into(views, 0, socket.MSG_WAITALL)[0]

    def _send_all(self, views: list[memoryview], deadline: float, flags: int) -> None:
        self._move(
            lambda window: self._socket.sendmsg(window, (), flags), socket.SO_SNDTIMEO, views, deadline
        )

    def _move(
        self,
        call: Callable[[list[memoryview]], int],
        timeout: int,
        views: list[memoryview],
        deadline: float,
    ) -> None:
        """Call `call` until it has moved all views. `timeout` is the socket option that sets its
        timeout."""
        for window in _windows(views):
            while window:
                left_us = int((deadline - time.monotonic()) * 1e6)
                if left_us <= 0:
                    raise DeadlinePassed("the deadline passed")
                timeval = struct.pack("@ll", left_us // 1_000_000, left_us % 1_000_000)
                try:
                    self._socket.setsockopt(socket.SOL_SOCKET, timeout, timeval)
                    moved = call(window)
                except BlockingIOError:
                    continue  # the timeout has passed
                except OSError as error:
                    raise _lost(error) from error
                if moved == 0:
                    raise ConnectionLost("connection closed by the other end")
                window = _behind(window, moved)


def _lost(error: OSError) -> ConnectionLost:
    return ConnectionLost(f"connection lost: {error.strerror or error}")


def pool_rows(flat: memoryview, block_bytes: int, block_ids: list[int]) -> list[memoryview]:
    """Views of these blocks, in this order. Consecutive blocks that are adjacent in memory share a view."""
    views = []
    start = 0
    for end in range(1, len(block_ids) + 1):
        if end < len(block_ids) and block_ids[end] == block_ids[end - 1] + 1:
            continue
        views.append(flat[block_ids[start] * block_bytes : (block_ids[end - 1] + 1) * block_bytes])
        start = end
    return views


def _windows(views: list[memoryview]) -> Iterator[list[memoryview]]:
    """Group the views, in order, by the amount that one system call moves."""
    window: list[memoryview] = []
    size = 0
    for view in views:
        window.append(view)
        size += len(view)
        if size >= _WINDOW_BYTES or len(window) == _WINDOW_VIEWS:
            yield window
            window, size = [], 0
    yield window


def _behind(views: list[memoryview], moved: int) -> list[memoryview]:
    """The views without their first `moved` bytes."""
    for index, view in enumerate(views):
        if moved < len(view):
            return [view[moved:], *views[index + 1 :]]
        moved -= len(view)
    return []
