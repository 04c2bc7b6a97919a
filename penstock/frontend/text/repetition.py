"""Detection of repetition: the answer ends once its last tokens are one pattern, several times over."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Annotated, Final

import msgspec
from msgspec import Meta

MAX_PATTERN_TOKENS: Final = 256

REPETITION: Final = "repetition_detected"
"""The `stop_reason` of an answer that ended so, as in vLLM."""


class RepetitionDetection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which repetition ends an answer: `min_count` times the same tokens, as many as these sizes say."""

    max_pattern_size: Annotated[int, Meta(ge=0, le=MAX_PATTERN_TOKENS)] | None = None  # 0: no detection
    min_pattern_size: Annotated[int, Meta(ge=0, le=MAX_PATTERN_TOKENS)] | None = None
    min_count: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None


class RepetitionDetector:
    """Reads one answer's tokens. Each costs at most `max_pattern_size` comparisons, whatever they are."""

    __slots__ = ("_count", "_equal", "_recent", "_smallest")

    def __init__(self, wanted: RepetitionDetection) -> None:
        self._smallest = max(1, wanted.min_pattern_size or 0)
        self._count = wanted.min_count or 0
        self._recent: deque[int] = deque(maxlen=wanted.max_pattern_size or 0)  # the latest token first
        # By distance: how many tokens in a row, up to the latest, are equal to the token so far before.
        self._equal: dict[int, int] = {}

    def end_of(self, token_ids: Sequence[int], first: int) -> int | None:
        """How many of the next tokens it takes until a pattern is there often enough; None when it is not
        yet. Only the tokens from the place `first` on may end the answer."""
        for place, token_id in enumerate(token_ids):
            before = self._equal
            self._equal = {
                distance: before.get(distance, 0) + 1
                for distance, other in enumerate(self._recent, 1)
                if other == token_id
            }
            self._recent.appendleft(token_id)
            if place >= first and any(
                equal >= distance * (self._count - 1) and distance >= self._smallest
                for distance, equal in self._equal.items()
            ):
                return place + 1
        return None
