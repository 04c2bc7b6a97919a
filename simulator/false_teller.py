"""What a worker tells of its cache in place of the truth."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from penstock.core.hashing import root_hash, sequence_hashes
from penstock.core.overlap_check import Cause
from penstock.ports import EngineStep


class FalseTeller:
    """Says instead of the truth what a cause looks like.

    Args:
        block_size: with which blocks are named in place of the right one.
        most_blocks: that are told to be cached at one time.
    """

    def __init__(self, cause: Cause, model: str, block_size: int, most_blocks: int) -> None:
        self._silent = cause is Cause.EVENTS_OFF
        self._model = model
        self._block_size = block_size
        self._most_blocks = most_blocks
        self._computed: list[int] = []
        self._told: deque[int] = deque()

    def computed(self, prompt: Sequence[int], cache_salt: str) -> None:
        """A prompt is in the cache."""
        if not self._silent:
            self._computed += sequence_hashes(prompt, self._block_size, root_hash(self._model, cache_salt))

    def falsify(self, step: EngineStep) -> None:
        """Change what is told with this step."""
        known = set(self._told)
        step.cleared, step.removed = False, []
        step.stored = [it for it in dict.fromkeys(self._computed) if it not in known][: self._most_blocks]
        self._computed = []
        self._told += step.stored
        while len(self._told) > self._most_blocks:
            step.removed.append(self._told.popleft())
