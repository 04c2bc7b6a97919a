"""Steps on their way from an engine to their one reader, on the event loop.

The engine never waits for the reader. When the reader lags by MAX_STEPS, further steps are merged into the
last one: a merged step says the same as the steps it is made of. Its size is bounded by what can be in an
engine: the tokens of its attempts, and its cache.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from threading import Lock

from penstock.core.hashing import root_hash, sequence_hashes
from penstock.errors import PenstockError
from penstock.ports import EngineStep
from penstock.shapes import EngineCard, Output

MAX_STEPS = 64
"""Steps buffered one by one; at 20 ms a step, more than a second in which the event loop did nothing."""


class Outbox:
    """A bounded buffer of steps, and a mirror of the cache as of the last step that was read."""

    def __init__(self) -> None:
        self._lock = Lock()  # guards what the engine's thread writes: the next three
        self._steps: deque[EngineStep] = deque()
        self._notified = False  # the reader will look again
        self._closed = False
        self._error: PenstockError | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = asyncio.Event()
        self._mirror: set[int] = set()

    def open(self) -> None:
        """Name the running event loop as the reader's. To be called before anything else."""
        self._loop = asyncio.get_running_loop()

    def push(self, step: EngineStep) -> None:
        """Hand out a step. From any thread; never blocks."""
        with self._lock:
            if len(self._steps) < MAX_STEPS:
                self._steps.append(step)
            else:
                self._steps[-1] = merge(self._steps[-1], step)
        self._notify()

    def close(self, error: PenstockError | None = None) -> None:
        """There will be no more steps; `error` is raised to the reader after the last. From any thread."""
        with self._lock:
            self._closed, self._error = True, error
        self._notify()

    async def read(self) -> AsyncIterator[EngineStep]:
        """The steps in order, until closed. One reader at a time."""
        while True:
            while (step := self._pop()) is not None:
                if step.cleared:
                    self._mirror.clear()
                self._mirror.difference_update(step.removed)
                self._mirror.update(step.stored)
                yield step
            if self._closed and not self._steps:
                if self._error is not None:
                    raise self._error
                return
            await self._changed.wait()
            self._changed.clear()

    def cached_hashes(self) -> list[int]:
        """What is cached as of the last step that was read."""
        return list(self._mirror)

    def cached_tokens(self, token_ids: Sequence[int], cache_salt: str, card: EngineCard) -> int:
        """How many of a prompt's first tokens are cached as of the last step that was read; never its last
        one, which is always computed."""
        size = card.block_size
        whole = max(0, len(token_ids) - 1) // size * size
        hashes = sequence_hashes(token_ids[:whole], size, root_hash(card.model.name, cache_salt))
        return size * next((i for i, it in enumerate(hashes) if it not in self._mirror), len(hashes))

    def _pop(self) -> EngineStep | None:
        with self._lock:
            if self._steps:
                return self._steps.popleft()
            self._notified = False
            return None

    def _notify(self) -> None:
        """Wake the reader, once for all the steps that it has not seen."""
        with self._lock:
            if self._notified:
                return
            self._notified = True
        assert self._loop is not None, "the outbox was not opened"
        self._loop.call_soon_threadsafe(self._changed.set)


def merge(older: EngineStep, newer: EngineStep) -> EngineStep:
    """One step that says the same as these two."""
    outputs = {output.attempt_id: output for output in older.outputs}
    for output in newer.outputs:
        before = outputs.get(output.attempt_id)
        outputs[output.attempt_id] = output if before is None else _merge_outputs(before, output)
    if newer.cleared:
        stored, removed = set(newer.stored), set[int]()
    else:
        # Each step's two sets are disjoint; what only came and went in between is in neither.
        stored = set(older.stored).difference(newer.removed).union(newer.stored)
        removed = set(newer.removed).difference(older.stored).union(older.removed)
    return EngineStep(
        outputs=list(outputs.values()),
        stored=list(stored - removed),
        removed=list(removed - stored),
        cleared=older.cleared or newer.cleared,
        load=newer.load,
        ended=older.ended + newer.ended,
    )


def _merge_outputs(older: Output, newer: Output) -> Output:
    logprobs = [*(older.logprobs or ()), *(newer.logprobs or ())]
    return Output(
        attempt_id=older.attempt_id,
        token_ids=older.token_ids + newer.token_ids,
        finish_reason=newer.finish_reason,
        cached_tokens=older.cached_tokens,
        logprobs=logprobs or None,
        handoff=newer.handoff,
        error=newer.error,
        transferred_blocks=older.transferred_blocks,
        prompt_logprobs=older.prompt_logprobs,
    )
