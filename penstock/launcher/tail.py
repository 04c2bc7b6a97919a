"""Reads the log files of a graph, for `penstock logs`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from penstock.checked import suggestion
from penstock.errors import ConfigError
from penstock.launcher.output import LineSplitter
from penstock.launcher.state import StateFolder

_BLOCK_BYTES = 64 * 1024
_READ_BYTES_MAX = 16 * 1024 * 1024  # most bytes of one file that are searched for its last lines
_POLL_S = 0.2

LogLine = tuple[str, str]  # replica's name, line


def select_logs(folder: StateFolder, names: Sequence[str]) -> dict[str, Path]:
    """The log files of the named services, roles or replicas; all log files when `names` is empty.

    Raises:
        ConfigError: a name matches no log file.
    """
    files = {path.stem: path for path in sorted(folder.logs.glob("*/*.log"))}
    selected = {} if names else dict(files)
    for wanted in names:
        found = {
            name: path
            for name, path in files.items()
            if _fits(wanted.removeprefix(f"{folder.graph}-"), name, path)
        }
        if not found:
            known = sorted({path.parent.name for path in files.values()} | set(files))
            raise ConfigError(
                f"{wanted}: no such service, role or instance{suggestion(wanted, known)};"
                f" there are {', '.join(known) or 'no logs yet'}"
            )
        selected |= found
    return selected


def _fits(wanted: str, name: str, path: Path) -> bool:
    service, role = path.parent.name, name.split("-")[0]
    return wanted in (name, role) or wanted.lower() == service.lower()


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a log file. A short file is preceded by the end of PATH.1, the older one."""
    if count <= 0:
        return []
    lines = _tail(path, count)
    older = path.with_name(path.name + ".1")
    if len(lines) < count and older.exists():
        lines = _tail(older, count - len(lines)) + lines
    return lines


def _tail(path: Path, count: int) -> list[str]:
    blocks: list[bytes] = []
    with path.open("rb") as file:
        position = end = file.seek(0, 2)
        while position > 0 and end - position < _READ_BYTES_MAX:
            size = min(_BLOCK_BYTES, position)
            position -= size
            file.seek(position)
            blocks.append(file.read(size))
            if sum(block.count(b"\n") for block in blocks) > count:
                break
    lines = b"".join(reversed(blocks)).split(b"\n")
    if lines and not lines[-1]:
        lines.pop()
    return [_text(line) for line in lines[-count:]]


def follow_logs(folder: StateFolder, names: Sequence[str]) -> Iterator[LogLine]:
    """New lines as they are written, also of replicas that start later. Ends when the graph stops."""
    with ExitStack() as opened:
        followed: dict[str, _Followed] = {}
        from_end = True
        while True:
            running = folder.is_running()
            for name, path in select_logs(folder, names).items():
                if name not in followed:
                    followed[name] = opened.enter_context(_Followed(path, from_end=from_end))
            from_end = False
            lines = [(name, line) for name, file in followed.items() for line in file.read()]
            yield from lines
            if not running:
                return
            if not lines:
                time.sleep(_POLL_S)


class _Followed:
    """A log file that is read on after it was renamed and begun anew."""

    def __init__(self, path: Path, *, from_end: bool) -> None:
        self._path = path
        self._lines = LineSplitter()
        self._file: BinaryIO = path.open("rb")
        if from_end:
            self._file.seek(0, 2)

    def __enter__(self) -> _Followed:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self) -> list[str]:
        lines = self._read_on()
        if self._replaced():
            lines += self._read_on()  # written between the first read and the check
            self._file.close()
            self._file = self._path.open("rb")
            lines += self._read_on()
        return lines

    def _read_on(self) -> list[str]:
        return [_text(line) for line in self._lines.feed(self._file.read(_READ_BYTES_MAX))]

    def _replaced(self) -> bool:
        try:
            return not os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False  # the file was renamed, and the new one does not exist yet


def _text(line: bytes) -> str:
    return line.decode(errors="replace").rstrip("\r")
