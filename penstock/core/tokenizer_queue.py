"""Whose long prompt the tokenizer's thread works on next, and who must come back later.

Theory. A frontend has one thread for long prompts. They wait for it as requests wait for a worker: order,
shares of tenants and predictions are core/admission.py's, with a character as the unit of work. A prompt
goes slice by slice and pays for each; between two slices others go whose turn has come, so nobody waits
behind the whole of a long one. A tenant's own prompts go first come, first served.

`max_wait_ms` bounds the wait until the last slice, as predicted when the prompt comes.
"""

from __future__ import annotations

from random import Random

from penstock.core.admission import AdmissionSettings, Queue, Refusal

SLICE_CHARS = 65_536
"""Of a slice, where a text can be cut: 5 to 70 ms of work, and the event loop waits for the GIL for some
of that, which with 4 million characters at once is 0.1 to 0.3 s."""

FIRST_MS_PER_CHAR = 1e-3
"""The thread's pace before it was measured: of words never seen, with a vocabulary of usual size."""


class TokenizerQueue:
    """The prompts that wait for the thread, the one in work included until its last slice. Pure; `now` in
    seconds.

    Ask `next` whenever something entered or a slice ended; tell `begin` and `end` of every slice.
    """

    def __init__(self, settings: AdmissionSettings, rng: Random) -> None:
        self._queue = Queue(settings, rng, "the tokenizer", timed=True)
        self._queue.guess(FIRST_MS_PER_CHAR, SLICE_CHARS)
        self._slice: tuple[float, float] | None = None  # what the thread works on: characters, since when

    def __len__(self) -> int:
        return len(self._queue)

    def chars(self) -> float:
        """That no slice was begun of."""
        return self._queue.work

    def enter(self, job_id: str, tenant: str, priority: int, chars: float, now: float) -> Refusal | None:
        """A prompt comes. Returns why it is refused, if it is."""
        refusal = self._queue.refusal(tenant, priority, now, parts=chars)
        if refusal is not None:
            return refusal
        self._queue.enter(job_id, "", tenant, priority, chars, now)
        self.next(now)  # the head finds out how long the thread is busy
        return self._queue.hopeless(job_id)

    def next(self, now: float) -> str | None:
        """Whose slice is to begin; None when the thread works, or nobody waits."""
        job_id = self._queue.next()
        if job_id is None:
            return None
        busy = self._slice is not None
        free = self._queue.may_go(job_id, self._busy_ms(now), 1, now, crowded=busy)
        return job_id if free else None

    def begin(self, job_id: str, chars: float, now: float, *, last: bool) -> None:
        """The thread begins a slice of this one, perhaps its last."""
        self._slice = (chars, now)
        if last:
            self._queue.take(job_id, now)
        else:
            self._queue.take_part(job_id, chars, now)

    def end(self, now: float) -> None:
        """The thread is free again."""
        if self._slice is not None:
            chars, since = self._slice
            self._queue.took(chars, (now - since) * 1e3)
        self._slice = None

    def leave(self, job_id: str) -> None:
        """Nobody waits for it any more. Unknown ids are ignored."""
        self._queue.leave(job_id)

    def wait_ms(self) -> float:
        """The predicted wait of a newcomer behind all that wait."""
        return self._queue.saturation_ms()

    def _busy_ms(self, now: float) -> float:
        if self._slice is None:
            return 0.0
        chars, since = self._slice
        return max(0.0, chars * self._queue.pace - (now - since) * 1e3)
