"""What happens in a simulation, in order: digest, trace, last events, and the first violation."""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

LAST_EVENTS = 40
"""Events that a violation is shown with."""


@dataclass(slots=True)
class Violation:
    """An invariant, and how it was broken."""

    invariant: str
    detail: str
    at: float


class Journal:
    """Takes every event and every violation.

    Args:
        now: the time of the simulation, in seconds.
        trace: gets every event as a line, as it happens.
        minded: the invariants whose violations count; all if not given.
    """

    def __init__(
        self,
        now: Callable[[], float],
        trace: Callable[[str], None] | None = None,
        minded: Container[str] | None = None,
    ) -> None:
        self.violation: Violation | None = None  # the first
        self.violated = asyncio.Event()
        self.closed = False  # nothing counts any more
        self._now = now
        self._trace = trace
        self._minded = minded
        self._digest = hashlib.blake2b(digest_size=8)
        self._last: deque[tuple[float, tuple[Any, ...]]] = deque(maxlen=LAST_EVENTS)

    @property
    def tracing(self) -> bool:
        """Whether somebody reads the trace."""
        return self._trace is not None

    def note(self, *event: Any) -> None:
        """Something happened."""
        if self.closed:
            return
        now = self._now()
        self._digest.update(f"{now:.9f} {event}".encode())
        self._last.append((now, event))
        if self._trace is not None:
            self._trace(_line(now, event))

    def violate(self, invariant: str, detail: str) -> None:
        """Something is as it must never be. The first violation ends the simulation."""
        if self._minded is not None and invariant not in self._minded:
            return
        if self.violation is None and not self.closed:
            self.note("VIOLATION", invariant, detail)
            self.violation = Violation(invariant, detail, self._now())
            self.violated.set()

    def trace(self, text: str) -> None:
        """A line for the trace alone."""
        if self._trace is not None and not self.closed:
            self._trace(_line(self._now(), (text,)))

    def digest(self) -> str:
        """Of all events so far, in order: equal for two simulations in which the same happened."""
        return self._digest.hexdigest()

    def last_events(self) -> list[str]:
        """The latest events, as lines."""
        return [_line(*event) for event in self._last]


def _line(now: float, event: tuple[Any, ...]) -> str:
    return f"{now:10.6f} " + " ".join(map(str, event))
