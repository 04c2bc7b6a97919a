"""Log lines to a reader that may be slow or stand still: a pipe, a terminal, a socket.

A launcher that is stopped (Ctrl-Z, a debugger), a terminal that is held (Ctrl-S) or a slow collector must
not stop a process that logs to it. So whoever logs never waits: what the reader has no room for is kept, up
to a limit, and written by a thread. What is beyond that is dropped and counted.

A log in a regular file is written directly, since nobody has to read it.
"""

from __future__ import annotations

import atexit
import io
import os
import select
import socket
import stat
import time
from collections import deque
from collections.abc import Callable
from threading import Lock
from typing import TextIO, cast

from penstock.detached import start_thread

MAX_KEPT_BYTES = 64 * 1024
"""Of lines for which the reader has no room yet, beside as much in the pipe itself: some 500 of them."""

LAST_LINES_S = 1.0
"""How long a process that ends waits for a slow reader to take what is kept."""


class LogPipe(io.TextIOBase):
    """A stream for logging's handler, over a descriptor that others may share. `write` never waits."""

    def __init__(self, descriptor: int) -> None:
        self._close_own: Callable[[], None] | None = None
        self._never_waits = True
        self._descriptor, self._write_some = descriptor, self._writer(descriptor)
        self._lock = Lock()  # never held while something is written
        self._kept: deque[bytes] = deque()  # in parts that a pipe takes as a whole; written by the thread
        self._kept_bytes = 0
        self._lost = 0
        self._writing_pid = 0  # the process in which the thread writes what is kept; 0: it does not
        atexit.register(self.finish)

    def _writer(self, descriptor: int) -> Callable[[bytes], int]:
        """How to write without waiting. The descriptor itself must not be made non-blocking: that would
        change it for all the processes that share it."""
        if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            shared = socket.socket(fileno=os.dup(descriptor))
            self._close_own = shared.close
            return lambda data: shared.send(data, socket.MSG_DONTWAIT)
        try:
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY
            own = os.open(f"/proc/self/fd/{descriptor}", flags)
        except OSError:  # another user's, without /proc, or without a reader
            self._never_waits = False
            return lambda data: os.write(descriptor, data)
        self._close_own = lambda: os.close(own)
        return lambda data: os.write(own, data)

    def close(self) -> None:
        """Only what is this object's own."""
        atexit.unregister(self.finish)
        if self._close_own is not None and not self.closed:
            self._close_own()
        super().close()

    def finish(self) -> None:
        """Wait for what is kept to be written, for LAST_LINES_S."""
        deadline = time.monotonic() + LAST_LINES_S
        while self._kept and time.monotonic() < deadline:
            time.sleep(LAST_LINES_S / 100)

    def write(self, text: str) -> int:
        """One line, or a few that belong together."""
        data = text.encode(errors="backslashreplace")
        with self._lock:
            behind = bool(self._kept)
        # When nothing is kept, the thread has nothing to write; and only one line comes here at a time,
        # since logging's handlers take turns.
        sent = 0 if behind else self._send_now(data)
        if sent < len(data):
            with self._lock:
                self._keep(data[sent:])
                self._write_on()
        return len(text)

    def _write_on(self) -> None:
        if self._writing_pid != (pid := os.getpid()):  # after a fork, the thread is the parent's
            self._writing_pid = pid
            try:
                start_thread(self._write_kept)
            except OSError:  # the system has no thread to give: the next line tries again
                self._writing_pid = 0

    def _send_now(self, data: bytes) -> int:
        """How much of it could be written at once."""
        sent = 0
        while self._never_waits and sent < len(data):
            try:
                sent += self._write_some(data[sent : sent + select.PIPE_BUF])
            except BlockingIOError:
                break
            except OSError:  # its reader is gone
                return len(data)
        return sent

    def _keep(self, data: bytes) -> None:
        """For the thread. What is too much is dropped, until half of the room is free again: then there is
        one word about many lost lines, and not one about each."""
        limit = MAX_KEPT_BYTES // 2 if self._lost else MAX_KEPT_BYTES
        if self._kept and self._kept_bytes + len(data) > limit:
            self._lost += 1
            return
        self._tell_lost()
        self._append(data)

    def _tell_lost(self) -> None:
        if self._lost:
            self._append(f"lines_lost={self._lost}: nobody read them\n".encode())
            self._lost = 0

    def _append(self, data: bytes) -> None:
        self._kept_bytes += len(data)
        self._kept.extend(
            data[start : start + select.PIPE_BUF] for start in range(0, len(data), select.PIPE_BUF)
        )

    # --- the thread that waits ----------------------------------------------------------------------

    def _write_kept(self) -> None:
        room = select.poll()
        room.register(self._descriptor, select.POLLOUT)
        more = True
        while more:
            part = self._kept[0]
            try:
                if self._never_waits:
                    room.poll()
                written = self._write_some(part)
            except BlockingIOError:
                continue  # others that write there were faster
            except OSError:  # its reader is gone, and with it all that was kept
                written = None
            with self._lock:
                more = self._wrote(part, written)

    def _wrote(self, part: bytes, written: int | None) -> bool:
        """Whether there is more to write. If not, this thread is done: the next line starts another."""
        if written is None:
            self._kept.clear()
            self._kept_bytes = self._lost = 0
        elif written < len(part):
            self._kept[0] = part[written:]
            self._kept_bytes -= written
        else:
            self._kept.popleft()
            self._kept_bytes -= written
            if not self._kept:
                self._tell_lost()
        if not self._kept:
            self._writing_pid = 0
        return bool(self._kept)


def unblocked(stream: TextIO) -> TextIO:
    """What to log to in place of an open text file: a LogPipe, or a regular file as it is."""
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (OSError, ValueError):
        return stream  # no real file
    waits = stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stream.isatty()
    return cast(TextIO, LogPipe(stream.fileno())) if waits else stream
