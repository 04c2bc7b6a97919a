"""A TCP connection with deadlines, that moves messages and pool rows.

The socket blocks, with the time left set as its timeout before each call: one system call then moves
megabytes (MSG_WAITALL), where a polled socket wakes for every segment and takes twice as long.
Deadlines are of `time.monotonic`.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator

from penstock.errors import RemoteError
from penstock.transfer.messages import LENGTH_BYTES, M, Message, check_length, frame, parsed

_WINDOW_BYTES = 4 * 1024 * 1024  # per system call: a deadline is looked at in between
_WINDOW_VIEWS = 1024  # IOV_MAX of Linux and macOS
_MORE = getattr(socket, "MSG_MORE", 0)  # Linux: wait for the bytes that follow before sending a segment


class ConnectionLost(RemoteError):
    """The other end closed the connection, or it broke."""


class DeadlinePassed(RemoteError):
    """The other end took too long."""


class Stream:
    """One connection. Used by one thread at a time, except for `cut`.

    Args:
        connected: a TCP socket, from here on the stream's; closed if this fails.

    Raises:
        ConnectionLost: it has been reset already.
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
        """Send a message; with `more`, along with what is sent next."""
        self._send_all([memoryview(frame(message))], deadline, _MORE if more else 0)

    def receive(self, kind: type[M], deadline: float) -> M:
        """The next message, which must be a `kind`.

        Raises:
            ProtocolError: it is something else.
        """
        length = int.from_bytes(self._receive_bytes(LENGTH_BYTES, deadline), "big")
        check_length(length)
        return parsed(kind, self._receive_bytes(length, deadline))

    def send_rows(self, rows: list[memoryview], deadline: float) -> None:
        """Send memory as it is, along with the message that follows."""
        self._send_all(rows, deadline, _MORE)

    def receive_rows(self, rows: list[memoryview], deadline: float) -> None:
        """Fill memory from the connection."""
        self._move(self._receive_some, socket.SO_RCVTIMEO, rows, deadline)

    def is_stale(self) -> bool:
        """Whether an idle connection was closed by the other end, or has bytes nobody asked for."""
        try:
            self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def cut(self) -> None:
        """End the connection under the thread that uses it; its call ends with ConnectionLost."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it has ended by itself

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
        """Have `call` move all the views; `timeout` is the socket option that bounds it."""
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
                    continue  # the time is over
                except OSError as error:
                    raise _lost(error) from error
                if moved == 0:
                    raise ConnectionLost("connection closed by the other end")
                window = _behind(window, moved)


def _lost(error: OSError) -> ConnectionLost:
    return ConnectionLost(f"connection lost: {error.strerror or error}")


def pool_rows(flat: memoryview, block_bytes: int, block_ids: list[int]) -> list[memoryview]:
    """Views of these blocks, in this order; neighbours in memory that follow each other share one."""
    views = []
    start = 0
    for end in range(1, len(block_ids) + 1):
        if end < len(block_ids) and block_ids[end] == block_ids[end - 1] + 1:
            continue
        views.append(flat[block_ids[start] * block_bytes : (block_ids[end - 1] + 1) * block_bytes])
        start = end
    return views


def _windows(views: list[memoryview]) -> Iterator[list[memoryview]]:
    """The views in order, as much at a time as one system call is to move."""
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
    """What is left of the views after their first `moved` bytes."""
    for index, view in enumerate(views):
        if moved < len(view):
            return [view[moved:], *views[index + 1 :]]
        moved -= len(view)
    return []
