"""Log lines into a pipe whose reader may stand still.

A launcher that is stopped (Ctrl-Z, a debugger) must not stop what it started: a full pipe would do that,
with the next line they log.
"""

from __future__ import annotations

import io
import os
import select
import stat
from typing import Any

_PATIENCE_MS = 100  # with a reader that is merely slow


class LogPipe(io.TextIOBase):
    """A stream for logging's handler. What the pipe has no room for is dropped, and counted in a line once
    there is room."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self._lost = 0

    def write(self, text: str) -> int:
        """One line, or a few that belong together."""
        if self._lost and self._send(f"lines_lost={self._lost}: nobody read them\n"):
            self._lost = 0
        if self._lost or not self._send(text):
            self._lost += 1
        return len(text)

    def _send(self, text: str) -> bool:
        data = text.encode(errors="backslashreplace")
        for start in range(0, len(data), select.PIPE_BUF):
            if not self._poll.poll(0 if self._lost else _PATIENCE_MS):
                return False
            try:
                os.write(self._descriptor, data[start : start + select.PIPE_BUF])  # has room as a whole
            except BrokenPipeError:
                return False  # its reader is gone
        return True


def is_pipe(stream: Any) -> bool:
    """Whether an open text file is one end of a pipe."""
    try:
        return stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):
        return False  # no real file
