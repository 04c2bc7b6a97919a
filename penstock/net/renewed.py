"""Values from files that may be replaced while a process runs: keys, secrets, certificates.

A replaced file needs no restart and no signal: its new content is used from then on. If it cannot be used,
the old value stays, and the log says why. The old value also stays while a network folder does not answer,
since files are read in threads.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event
from typing import Final, Generic, TypeVar

from penstock.clock import Clock, MonotonicClock
from penstock.detached import start_thread
from penstock.errors import ConfigError

T = TypeVar("T")

log = logging.getLogger("penstock.renewed")

RECHECK_S: Final = 1.0
"""Interval between checks of a file, and so the longest time for which an old value is used."""

ANSWER_S: Final = 0.02
"""The longest time for which `get` waits for a check. A slower check goes on, and its result is used
later."""

SILENCE_S: Final = 3.0
"""A check that takes longer than this is logged."""

_Stamp = tuple[int, int, int, int]  # mtime and ctime in ns, size, inode


class Renewed(Generic[T]):
    """A value from files, read again when one of them has changed.

    Args:
        what: a name for the value, for the log.
        paths: the files.
        read: reads the files and returns the value. Raises ConfigError if they cannot be used. Called in a
            thread, except for the first time.
        clock: the clock for the interval between checks.

    Raises the same errors as `read`.
    """

    def __init__(
        self, what: str, paths: Sequence[Path], read: Callable[[], T], clock: Clock | None = None
    ) -> None:
        self._what = what
        self._paths = paths
        self._read = read
        self._clock = clock or MonotonicClock()
        self._trouble = ""  # why the latest check failed
        self._looked_at = self._clock.now()
        self._looked = Event()
        self._looked.set()
        self._stamps = self._look()
        self._value = read()

    def get(self) -> T:
        """The current value. Never raises. Costs a comparison, and once a second a check of the files in a
        thread, for which it waits at most ANSWER_S."""
        now = self._clock.now()
        if not self._looked.is_set():
            if now - self._looked_at >= SILENCE_S:
                self._say(f"no answer in {SILENCE_S:g} s")
        elif now - self._looked_at >= RECHECK_S:
            self._looked_at = now
            self._looked.clear()
            try:
                start_thread(self._look_again)
            except OSError as error:
                self._looked.set()
                self._say(str(error))
            self._looked.wait(ANSWER_S)
        return self._value

    def _look_again(self) -> None:
        try:
            stamps = self._look()
            if stamps != self._stamps:
                self._value = self._read()
                self._stamps, self._trouble = stamps, ""
                log.info("%s: read again", self._what)
        except (ConfigError, OSError) as error:
            self._say(str(error))
        finally:
            self._looked.set()

    def _say(self, trouble: str) -> None:
        """Log a problem once. Every check tries again."""
        if trouble != self._trouble:
            self._trouble = trouble
            log.error("%s: the value read before stays in use: %s", self._what, trouble)

    def _look(self) -> list[_Stamp | None]:
        """The stamps of the files. Taken before reading, so that the next check sees a change in
        between."""
        return [_stamp(path) for path in self._paths]


def read_text(what: str, path: Path, max_bytes: int) -> str:
    """The text of a small file. Raises ConfigError, whose message shows nothing of the content."""
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise ConfigError(f"{what}: {path} has more than {max_bytes} bytes")
        return content.decode()
    except OSError as error:
        raise ConfigError(f"{what}: cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:  # its message would show some of the bytes
        raise ConfigError(f"{what}: cannot read {path}: it is not UTF-8 text") from None


def _stamp(path: Path) -> _Stamp | None:
    """A value that changes whenever the file does; None if there is no file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino
