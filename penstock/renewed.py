"""Files that are renewed while a process runs: keys, secrets, certificates.

Whoever renews them needs no restart and no signal: what is used next is what stands there now. What
cannot be used is not taken: what was read before stays, and the log says why.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Generic, TypeVar

from penstock.clock import Clock, MonotonicClock
from penstock.errors import ConfigError

T = TypeVar("T")

log = logging.getLogger("penstock.renewed")

RECHECK_S: Final = 1.0
"""Between two looks at a file, however often it is asked for: how long an old value may count."""

_Stamp = tuple[int, int, int, int]  # when it and its permissions were changed, its size, and which it is


class Renewed(Generic[T]):
    """A value from files, read again when one of them has changed.

    Args:
        what: it is, for the log.
        paths: of the files.
        read: reads them all. Raises ConfigError when they cannot be used; a value is expected to be small,
            as this happens on the event loop.
        clock: for the pauses between two looks.

    Raises what `read` raises.
    """

    def __init__(
        self, what: str, paths: Sequence[Path], read: Callable[[], T], clock: Clock | None = None
    ) -> None:
        self._what = what
        self._paths = paths
        self._read = read
        self._clock = clock or MonotonicClock()
        self._trouble = ""  # why it could not be read again
        self._stamps = self._look()
        self._value = read()

    def get(self) -> T:
        """The value now. Never raises; costs a comparison, and once a second a `stat` for each file."""
        if self._clock.now() - self._looked_at < RECHECK_S:
            return self._value
        stamps = self._look()
        if stamps != self._stamps:
            try:
                self._value = self._read()
            except (ConfigError, OSError) as error:
                if str(error) != self._trouble:  # it is tried again with every look: that may have passed
                    log.error("%s: what was read before stays: %s", self._what, error)
                self._trouble = str(error)
            else:
                self._stamps, self._trouble = stamps, ""
                log.info("%s: read again", self._what)
        return self._value

    def _look(self) -> list[_Stamp | None]:
        """Before reading, so that a change in between is seen the next time."""
        self._looked_at = self._clock.now()
        return [_stamp(path) for path in self._paths]


def read_text(what: str, path: Path, max_bytes: int) -> str:
    """A small file. Raises ConfigError, whose message shows nothing of what stands in it."""
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise ConfigError(f"{what}: {path} has more than {max_bytes} bytes")
        return content.decode()
    except OSError as error:
        raise ConfigError(f"{what}: cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:  # its own words would show some of the bytes
        raise ConfigError(f"{what}: cannot read {path}: it is no UTF-8 text") from None


def _stamp(path: Path) -> _Stamp | None:
    """Changes whenever the file does; None when there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino
