"""Writes the output of processes: each to a log file of limited size, and all to the terminal."""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from pathlib import Path
from typing import IO, Any, BinaryIO, TextIO

_LINE_BYTES_MAX = 32 * 1024  # a longer line is shown in parts
_PENDING_LINES_MAX = 10_000  # for a terminal that is slower than the processes
_COLOURS = ("36", "33", "32", "35", "34", "96", "93", "92", "95", "94")
_CLOSE_TIMEOUT_S = 2.0


class LogFile:
    """Appends to a file. At `bytes_max` the file is renamed to PATH.1, which replaces the older one. A file
    that was deleted is made again."""

    def __init__(self, path: Path, bytes_max: int) -> None:
        self._path = path
        self._bytes_max = bytes_max
        self._file: BinaryIO | None = None
        self._size = 0
        self.error = ""  # why the latest write failed; a full disk must not stop the process that logs

    def write(self, chunk: bytes) -> None:
        try:
            if self._file is None or self._size >= self._bytes_max or not leads_to(self._path, self._file):
                self._file = self._open()
            self._file.write(chunk)
            self._size += len(chunk)
            self.error = ""
        except OSError as error:
            self.error = f"cannot write to {self._path}: {error.strerror}"

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> BinaryIO:
        self.close()
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._path.exists() and self._path.stat().st_size >= self._bytes_max:
            self._path.replace(self._path.with_name(self._path.name + ".1"))
        file = self._path.open("ab", buffering=0)
        self._size = file.tell()
        return file


def leads_to(path: Path, file: IO[Any]) -> bool:
    """Whether this path still names this open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except OSError:
        return False


def prefixed(name: str, line: str, width: int, colour: str | None = None) -> str:
    """`prefill-0 | line`, with the prefix in a terminal's colour if one is given."""
    prefix = f"{name:<{width}} |"
    return f"\x1b[{colour}m{prefix}\x1b[0m {line}" if colour else f"{prefix} {line}"


class LineSplitter:
    """Splits chunks into lines. An unfinished line waits for its end, up to `_LINE_BYTES_MAX`."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        while len(self._rest) > _LINE_BYTES_MAX:
            lines.append(self._rest[:_LINE_BYTES_MAX])
            self._rest = self._rest[_LINE_BYTES_MAX:]
        return lines

    def flush(self) -> list[bytes]:
        rest, self._rest = self._rest, b""
        return [rest] if rest else []


class Console:
    """Prints lines as `prefill-0 | ...` from a thread, so that a stopped terminal blocks no process.

    When the terminal is too slow, lines are left out, and a line says how many. The log files have all of
    them.
    """

    def __init__(
        self, stream: TextIO | None = None, *, colour: bool | None = None, width: int = 10
    ) -> None:
        self._stream = stream or sys.stdout
        self._colour = self._stream.isatty() and "NO_COLOR" not in os.environ if colour is None else colour
        self._width = width
        self._colours: dict[str, str] = {}
        self._pending: deque[tuple[str, str]] = deque()
        self._missed = 0
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._print_all, name="console", daemon=True)
        self._thread.start()

    def write(self, name: str, line: str) -> None:
        """Queue one line for printing. Never waits."""
        with self._wake:
            if len(self._pending) >= _PENDING_LINES_MAX:
                self._missed += 1
                return
            self._pending.append((name, line))
            self._wake.notify()

    def close(self) -> None:
        """Print the queued lines, and wait for at most 2 s."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(_CLOSE_TIMEOUT_S)

    def _print_all(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._pending or self._closing)
                batch = [self._format(name, line) for name, line in self._pending]
                self._pending.clear()
                if self._missed:
                    batch.append(self._format("penstock", f"{self._missed} lines not shown here"))
                    self._missed = 0
                last = self._closing
            try:
                self._stream.write("".join(batch))
                self._stream.flush()
            except (OSError, ValueError):
                return  # the terminal is gone or closed; the log files are still written
            if last:
                return

    def _format(self, name: str, line: str) -> str:
        colour = None
        if self._colour:
            colour = self._colours.setdefault(name, _COLOURS[len(self._colours) % len(_COLOURS)])
        return prefixed(name, line, self._width, colour) + "\n"
