"""Which long prompt a frontend's tokenizer thread works on next, and which prompts are refused.

A frontend has one thread for long prompts. They wait for it in the order of core/fair_queue.py, with
characters as the unit of work. A prompt is tokenized slice by slice; after each slice the next entry of
that order goes on, so no prompt waits behind the whole of another tenant's long one. A prompt whose last
slice is predicted to begin later than `max_wait_ms` is refused when it comes (core/wait_prediction.py).
"""

from __future__ import annotations

from random import Random

import msgspec

from penstock.core.fair_queue import FairQueue
from penstock.core.wait_prediction import Pace, Refusal, WaitPrediction

SLICE_CHARS = 65_536
"""Of a slice, where a text can be cut: 5 to 70 ms of work, and the event loop waits for the GIL for some
of that, which with 4 million characters at once is 0.1 to 0.3 s."""

FIRST_MS_PER_CHAR = 1e-3
"""The thread's pace before it was measured: of words never seen, with a vocabulary of usual size."""

PACE_HALF_LIFE_S = 0.5
"""Of the thread's pace. It serves one slice at a time, so a few of them show how fast it is."""


class TokenizerLimits(msgspec.Struct, frozen=True):
    """What may wait for the tokenizer thread."""

    max_wait_ms: float = 10_000.0
    """The longest predicted wait for the last slice, for which a prompt is let in."""

    max_chars: int = 64 * 1024 * 1024
    """However few or many prompts they are of. A tenant's can fill half of it. Each character is there up
    to four times (messages, prompt, segments, slices), at 1 to 4 bytes, whichever its widest needs: 256
    MiB for ASCII, and 1 GiB at most."""


class TokenizerQueue:
    """The prompts that wait for the thread, the one in work included until its last slice. Pure; `now` in
    seconds.

    Ask `next` whenever a prompt entered or a slice ended; call `begin` and `end` for every slice.
    """

    def __init__(self, limits: TokenizerLimits, rng: Random) -> None:
        self._max_chars = limits.max_chars
        self._queue = FairQueue()  # every entry has one member
        pace = Pace(PACE_HALF_LIFE_S)
        pace.guess(FIRST_MS_PER_CHAR * SLICE_CHARS, SLICE_CHARS)
        self._prediction = WaitPrediction(self._queue, "the tokenizer", limits.max_wait_ms, rng, pace)
        self._slice: tuple[float, float] | None = None  # what the thread works on: characters, since when

    def __len__(self) -> int:
        return len(self._queue)

    def chars(self) -> float:
        """Characters that wait: of no slice that was begun."""
        return self._queue.work

    def wait_ms(self, now: float) -> float:
        """The predicted wait of a newcomer behind all that wait."""
        return self._busy_ms(now) + self._prediction.served_in_ms(self._queue.work)

    def enter(self, job_id: str, tenant: str, priority: int, chars: float, now: float) -> Refusal | None:
        """A prompt comes. Returns why it is refused, if it is."""
        self._prediction.head_ms = self._busy_ms(now)
        wait_ms = self._prediction.newcomer_ms(tenant, priority, now, chars)
        own_chars = chars + sum(flow.work for flow in self._queue.flows_of(tenant))
        limit = "characters" if own_chars > self._max_chars - self._queue.work else ""
        refusal = self._prediction.refuse(wait_ms, limit)
        if refusal is None:
            flow = self._queue.add(job_id, job_id, tenant, priority, chars).flow
            if self._slice is not None:
                self._prediction.flow_waits(flow, now)
        return refusal

    def next(self) -> str | None:
        """The prompt whose slice is to begin; None when the thread works, or no prompt waits."""
        entry = self._queue.first()
        return entry.key if entry is not None and self._slice is None else None

    def begin(self, job_id: str, chars: float, now: float, *, last: bool) -> None:
        """The thread begins a slice of this prompt, perhaps its last."""
        entry = self._queue[job_id]
        self._queue.charge(entry, chars)
        self._prediction.flow_served(entry.flow, chars, now)
        self._prediction.pace.start(now)
        self._slice = chars, now
        if last:
            self.leave(job_id)
        else:
            self._queue.cut(job_id, chars)
            self._prediction.flow_waits(entry.flow, now)

    def end(self, now: float) -> None:
        """The thread is free again."""
        if self._slice is not None:
            self._prediction.pace.count(self._slice[0], now)
            self._prediction.pace.stop()
        self._slice = None

    def leave(self, job_id: str) -> None:
        """No slice of this prompt is to begin any more. Unknown ids are ignored."""
        if job_id in self._queue:
            self._prediction.flow_shrank(self._queue.remove(job_id))

    def _busy_ms(self, now: float) -> float:
        """How long the thread's present slice takes yet."""
        if self._slice is None:
            return 0.0
        chars, since = self._slice
        return max(0.0, self._prediction.served_in_ms(chars) - (now - since) * 1e3)
