"""The thread that tokenizes long prompts, a slice at a time, for whoever's turn it is.

A shell: core/tokenizer_queue.py decides. Everything here runs on the event loop, but for the slices.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from array import array
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from penstock.core.tokenizer_queue import SLICE_CHARS, TokenizerLimits, TokenizerQueue
from penstock.errors import Rejection, RequestRejected
from penstock.frontend.text.words import WordEncoder
from penstock.metrics import TokenizerMetrics

T = TypeVar("T")

RETRY_AFTER_S = 1.0
"""After a prompt took too long: others' may have been the reason."""

Slice = list[tuple[int, str]]
"""Pieces, each with the number of the text that it is of."""


@dataclass(slots=True)
class Caller:
    """Whose call it is, and how long tokenizing its prompts may take."""

    tenant: str  # the name of its API key; empty where none are needed
    priority: int
    since: float  # perf_counter, once its call was read
    limit_s: float
    session: str = ""  # as the call's headers name it (frontend/sessions.py)

    async def wait(self, wanted: Awaitable[T]) -> T:
        """What is wanted. Raises RequestRejected(UNAVAILABLE) when that is not there in time."""
        try:
            async with asyncio.timeout(self.since + self.limit_s - time.perf_counter()):
                return await wanted
        except TimeoutError:
            message = f"The prompt was not tokenized within {self.limit_s:g} s."
            raise RequestRejected(
                message, kind=Rejection.UNAVAILABLE, code="tokenizer_timeout", retry_after_s=RETRY_AFTER_S
            ) from None


class TurnBudget:
    """How much text may be tokenized at once, by all calls within one turn of the event loop: many short
    prompts that come together would hold up everybody's tokens like a long one."""

    def __init__(self, max_chars: int) -> None:
        self._max_chars = max_chars
        self._chars = 0

    def has_place(self, chars: int) -> bool:
        """Whether so much more may be; if so, it counts."""
        if self._chars + chars > self._max_chars:
            return False
        if not self._chars:
            asyncio.get_running_loop().call_soon(self._next_turn)
        self._chars += chars
        return True

    def _next_turn(self) -> None:
        self._chars = 0


@dataclass(slots=True, eq=False)
class _Job:
    """The texts of a call."""

    words: WordEncoder
    slices: deque[Slice]
    token_ids: list[array[int]]  # of each text, so far
    done: asyncio.Future[None]
    worked_s: float = 0.0  # of the thread's time


class TokenizerThread:
    """Long texts to token ids, within limits."""

    def __init__(self, limits: TokenizerLimits, metrics: TokenizerMetrics) -> None:
        self._metrics = metrics
        self._queue = TokenizerQueue(limits, random.Random())
        self._jobs: dict[str, _Job] = {}
        self._numbers = itertools.count()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        metrics.queue_from(
            self._queue.__len__, self._queue.chars, lambda: self._queue.wait_ms(time.perf_counter())
        )

    async def encode(self, words: WordEncoder, texts: Sequence[str], caller: Caller) -> list[array[int]]:
        """Each text's ids. Who is cancelled leaves the queue. Raises RequestRejected(OVERLOADED) when that
        would take too long."""
        slices = deque(_slices(words, texts))
        done = asyncio.get_running_loop().create_future()
        job = _Job(words, slices, [array("I") for _ in texts], done)
        job_id, chars, began = str(next(self._numbers)), sum(map(len, texts)), time.perf_counter()
        self._jobs[job_id] = job
        try:
            refusal = self._queue.enter(job_id, caller.tenant, caller.priority, chars, began)
            if refusal is not None:
                self._metrics.rejected(refusal.reason)
                retry_after_s = refusal.retry_after_s
                raise RequestRejected(str(refusal), kind=Rejection.OVERLOADED, retry_after_s=retry_after_s)
            self._advance()
            await done
        finally:
            del self._jobs[job_id]
            self._queue.leave(job_id)
        self._metrics.waited(time.perf_counter() - began - job.worked_s)
        return job.token_ids

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` returns, which takes no longer than some slices, after the slice under way."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def close(self) -> None:
        """End the thread; the slice that it works on is finished first."""
        self._executor.shutdown(cancel_futures=True)

    def _advance(self) -> None:
        """Begin the next slice if the thread is free."""
        now = time.perf_counter()
        job_id = self._queue.next()
        if job_id is None:
            return
        job = self._jobs[job_id]
        pieces = job.slices.popleft()
        texts = [piece for _, piece in pieces]
        self._queue.begin(job_id, sum(map(len, texts)), now, last=not job.slices)
        running = asyncio.get_running_loop().run_in_executor(self._executor, job.words.encode, texts)
        running.add_done_callback(partial(self._on_slice, job_id, job, pieces, now))

    def _on_slice(
        self, job_id: str, job: _Job, pieces: Slice, began: float, running: asyncio.Future[list[array[int]]]
    ) -> None:
        now = time.perf_counter()
        self._queue.end(now)
        if running.cancelled():  # by `close`
            job.done.cancel()
            return
        job.worked_s += now - began
        error = running.exception()
        if job.done.done():
            pass  # who wanted it has left
        elif error is not None:
            self._queue.leave(job_id)
            job.done.set_exception(error)
        else:
            for (text, _), token_ids in zip(pieces, running.result(), strict=True):
                job.token_ids[text].extend(token_ids)
            if not job.slices:
                job.done.set_result(None)
        self._advance()


def _slices(words: WordEncoder, texts: Sequence[str]) -> Iterator[Slice]:
    """The texts in their order, cut and put together so that a slice has about SLICE_CHARS."""
    pieces: Slice = []
    chars = 0
    for number, text in enumerate(texts):
        for piece in words.pieces(text, SLICE_CHARS):
            if pieces and chars + len(piece) > SLICE_CHARS:
                yield pieces
                pieces, chars = [], 0
            pieces.append((number, piece))
            chars += len(piece)
    yield pieces
