"""`thinking_budget`: a model's reasoning is ended once it has become long enough, as vLLM does it."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import NamedTuple


class ThinkingMarks(NamedTuple):
    """The tokens between which a model reasons."""

    begin_id: int
    end_id: int


class ThinkingBudget:
    """Follows one sequence. The marks that come last, in prompt or output, say whether it reasons."""

    __slots__ = ("_marks", "_place", "_read")

    def __init__(self, marks: ThinkingMarks) -> None:
        self._marks = marks
        self._read = 0  # tokens
        self._place: int | None = None  # of the first token of the reasoning that goes on

    def is_spent(self, token_ids: Items[int], budget: int) -> bool:
        """Whether reasoning goes on after these tokens and has as many of them as it may have. Each call
        has the tokens of the one before, and perhaps more."""
        for place in range(self._read, len(token_ids)):
            if token_ids[place] == self._marks.begin_id:
                self._place = place + 1
            elif token_ids[place] == self._marks.end_id:
                self._place = None
        self._read = len(token_ids)
        return self._place is not None and self._read - self._place >= budget
