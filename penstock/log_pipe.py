"""Log lines into a pipe whose reader may stand still.

A launcher that is stopped (Ctrl-Z, a debugger) must not stop what it started: a full pipe would do that,
with the next line they log.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import stat
from typing import TextIO, cast

_PATIENCE_MS = 100  # with a reader that is merely slow
_TRIES = 3  # where other processes that write to the same pipe are faster


class LogPipe(io.TextIOBase):
    """A stream for logging's handler. What the pipe has no room for is dropped, and counted in a line once
    there is room."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._own = descriptor, False
        # The same pipe, for writes that never block; `descriptor` itself is shared with other processes.
        # With another user's pipe, or without /proc or a reader, a write may block, if others are faster.
        with contextlib.suppress(OSError):
            flags = os.O_WRONLY | os.O_NONBLOCK
            self._descriptor, self._own = os.open(f"/proc/self/fd/{descriptor}", flags), True
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLOUT)
        self._lost = 0

    def close(self) -> None:
        """Only what is this object's own."""
        if self._own and not self.closed:
            os.close(self._descriptor)
        super().close()

    def write(self, text: str) -> int:
        """One line, or a few that belong together."""
        if self._lost and self._send(f"lines_lost={self._lost}: nobody read them\n"):
            self._lost = 0
        if self._lost or not self._send(text):
            self._lost += 1
        return len(text)

    def _send(self, text: str) -> bool:
        data = text.encode(errors="backslashreplace")
        parts = (data[start : start + select.PIPE_BUF] for start in range(0, len(data), select.PIPE_BUF))
        return all(map(self._send_part, parts))

    def _send_part(self, part: bytes) -> bool:
        """PIPE_BUF or less, for which there is room as a whole, or none."""
        for _ in range(_TRIES):
            if not self._poll.poll(0 if self._lost else _PATIENCE_MS):
                break
            try:
                os.write(self._descriptor, part)
                return True
            except BlockingIOError:
                continue
            except BrokenPipeError:
                break  # its reader is gone
        return False


def unblocked(stream: TextIO) -> TextIO:
    """What to log to in place of an open text file: a pipe's LogPipe, anything else as it is."""
    try:
        is_pipe = stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):
        is_pipe = False  # no real file
    return cast(TextIO, LogPipe(stream.fileno())) if is_pipe else stream
