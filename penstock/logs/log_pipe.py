"""Writes log lines to a pipe, a terminal or a socket, whose reader may be slow or suspended.

A stopped launcher (Ctrl-Z, a debugger), a paused terminal (Ctrl-S) or a slow collector must not stop a
process that logs. So a logging call never waits: lines that do not fit into the pipe are kept, up to a
limit, and a thread writes them later. Further lines are dropped and counted.

Lines to a regular file are written directly, since a file has no reader to wait for.
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
"""Most bytes of lines that are kept, about 500 lines. The pipe itself holds as much again."""

LAST_LINES_S = 1.0
"""How long a process that ends waits for a slow reader to take the kept lines."""


def _lost_line(count: int) -> str:
    return f"lines_lost={count}: nobody read them"


class LogPipe(io.TextIOBase):
    """A stream for a logging handler, over a descriptor that other processes may share. `write` never
    waits."""

    def __init__(self, descriptor: int, lost_line: Callable[[int], str] = _lost_line) -> None:
        """`lost_line` makes the line that says how many are missing in its place."""
        self._lost_line = lost_line
        self._close_own: Callable[[], None] | None = None
        self._never_waits = True
        self._descriptor, self._write_some = descriptor, self._writer(descriptor)
        self._lock = Lock()  # never held while something is written
        self._kept: deque[bytes] = deque()  # in pieces that a pipe takes whole; the thread writes them
        self._kept_bytes = 0
        self._lost = 0
        self._writing_pid = 0  # the process whose thread writes the kept lines; 0: none runs
        atexit.register(self.finish)

    def _writer(self, descriptor: int) -> Callable[[bytes], int]:
        """A function that writes without waiting. The descriptor itself must not be made non-blocking,
        since that would affect all processes that share it."""
        if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            shared = socket.socket(fileno=os.dup(descriptor))
            self._close_own = shared.close
            return lambda data: shared.send(data, socket.MSG_DONTWAIT)
        try:
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY
            own = os.open(f"/proc/self/fd/{descriptor}", flags)
        except OSError:  # it belongs to another user, /proc is missing, or there is no reader
            self._never_waits = False
            return lambda data: os.write(descriptor, data)
        self._close_own = lambda: os.close(own)
        return lambda data: os.write(own, data)

    def close(self) -> None:
        """Close the duplicate descriptor only; the given one stays open."""
        atexit.unregister(self.finish)
        if self._close_own is not None and not self.closed:
            self._close_own()
        super().close()

    def finish(self) -> None:
        """Wait until the kept lines are written, for at most LAST_LINES_S."""
        deadline = time.monotonic() + LAST_LINES_S
        while self._kept and time.monotonic() < deadline:
            time.sleep(LAST_LINES_S / 100)

    def write(self, text: str) -> int:
        """Write one line, or several that belong together."""
        data = text.encode(errors="backslashreplace")
        with self._lock:
            behind = bool(self._kept)
        # When nothing is kept, the thread writes nothing. And logging handlers hold a lock, so that only
        # one call runs at a time.
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
            except OSError:  # no thread can be started; the next line tries again
                self._writing_pid = 0

    def _send_now(self, data: bytes) -> int:
        """Write without waiting. Returns the number of bytes written."""
        sent = 0
        while self._never_waits and sent < len(data):
            try:
                sent += self._write_some(data[sent : sent + select.PIPE_BUF])
            except BlockingIOError:
                break
            except OSError:  # the reader is gone
                return len(data)
        return sent

    def _keep(self, data: bytes) -> None:
        """Keep data for the thread. After the limit is reached, lines are dropped until half of the room is
        free again: so one line reports many lost lines."""
        limit = MAX_KEPT_BYTES // 2 if self._lost else MAX_KEPT_BYTES
        if self._kept and self._kept_bytes + len(data) > limit:
            self._lost += 1
            return
        self._tell_lost()
        self._append(data)

    def _tell_lost(self) -> None:
        if self._lost:
            self._append(f"{self._lost_line(self._lost)}\n".encode())
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
                continue  # another process filled the pipe first
            except OSError:  # the reader is gone; the kept lines are dropped
                written = None
            with self._lock:
                more = self._wrote(part, written)

    def _wrote(self, part: bytes, written: int | None) -> bool:
        """Record what was written. Returns whether there is more; if not, this thread ends."""
        if written is None:
            self._kept.clear()
            self._kept_bytes = self._lost = 0
        elif written < len(part):
            self._kept[0] = part[written:]
            self._kept_bytes -= written
        else:
            if len(self._kept) == 1:
                self._tell_lost()  # before the last part goes: `finish` waits only while something is kept
            self._kept.popleft()
            self._kept_bytes -= written
        if not self._kept:
            self._writing_pid = 0
        return bool(self._kept)


def unblocked(stream: TextIO, lost_line: Callable[[int], str] = _lost_line) -> TextIO:
    """The stream to log to in place of `stream`: a LogPipe, or the stream itself if it is a regular
    file."""
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (OSError, ValueError):
        return stream  # it has no descriptor
    waits = stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stream.isatty()
    return cast(TextIO, LogPipe(stream.fileno(), lost_line)) if waits else stream
