"""Stop strings, found across the borders of tokens.

Text is held back only as long as it might still become a stop string. The stop string that is complete
first wins (of two that end together, the longer), so the outcome does not depend on how the text is cut
into tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes one answer's text through until a stop string is complete."""

    __slots__ = ("_first_chars", "_held", "_include", "_longest", "_stops", "matched")

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops = tuple(stops)
        self._include = include  # whether the stop string itself is part of the answer
        self._longest = max(map(len, stops))
        self._first_chars = frozenset(stop[0] for stop in stops)
        self._held = ""
        self.matched: str | None = None  # the stop string that was found

    def push(self, text: str) -> str:
        """The text that is safe to show now; the answer's last when `matched` is set thereafter."""
        text = self._held + text
        ends = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            self._held = ""
            end, start = min(ends)
            self.matched = text[start:end]
            return text[: end if self._include else start]
        safe = self._partial_start(text)
        self._held = text[safe:]
        return text[:safe]

    def flush(self) -> str:
        """What was held back; no stop string came of it."""
        held, self._held = self._held, ""
        return held

    def _partial_start(self, text: str) -> int:
        """Where the longest ending of `text` begins with which some stop string begins."""
        first_chars = self._first_chars
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in first_chars:
                ending = text[start:]
                if any(stop.startswith(ending) for stop in self._stops):
                    return start
        return len(text)
