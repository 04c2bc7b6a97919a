"""Files that are renewed while a process runs: keys, secrets, certificates.

Whoever renews them needs no restart and no signal: what is used next is what stands there now. What
cannot be used is not taken: what was read before stays, and the log says why. So it is while the folder
that they are in does not answer, as when a network folder's server is gone: all reading is done in threads.
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
"""Between two looks at a file, however often it is asked for: how long an old value may count."""

ANSWER_S: Final = 0.02
"""How long a look may hold up whoever asked. One that takes longer goes on, and counts once it is done."""

SILENCE_S: Final = 3.0
"""After so long a look without an answer, the log says so."""

_Stamp = tuple[int, int, int, int]  # when it and its permissions were changed, its size, and which it is


class Renewed(Generic[T]):
    """A value from files, read again when one of them has changed.

    Args:
        what: it is, for the log.
        paths: of the files.
        read: reads them all. Raises ConfigError when they cannot be used. Called in a thread, but for the
            first time.
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
        self._looked_at = self._clock.now()
        self._looked = Event()
        self._looked.set()
        self._stamps = self._look()
        self._value = read()

    def get(self) -> T:
        """The value now. Never raises; costs a comparison, and once a second a look at the files, in a
        thread which is waited for at most ANSWER_S."""
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
        """Once: it is tried again with every look, and may pass."""
        if trouble != self._trouble:
            self._trouble = trouble
            log.error("%s: what was read before stays: %s", self._what, trouble)

    def _look(self) -> list[_Stamp | None]:
        """Before reading, so that a change in between is seen the next time."""
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
