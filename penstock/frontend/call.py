"""One client's call while the router serves it: all its choices, from submission to the last token."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial

from penstock.errors import PenstockError
from penstock.frontend.answer import Answer
from penstock.frontend.completer import Completer, Ticket
from penstock.observability import ModelMetrics
from penstock.structs import Delta, Request


class Call:
    """Submits the requests of a call's answers, and wakes whoever writes the response.

    Ends in one of three ways: every answer has its finish_reason, or `error` is set, or `gone` is set
    (nobody reads any more). In the latter two, what still runs has been cancelled.
    """

    def __init__(
        self,
        answers: Sequence[Answer],
        *,
        metrics: ModelMetrics,
        streaming: bool,
        max_unsent_chars: int,
        on_overflow: Callable[[], None],
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`on_overflow` is called when a stream's reader leaves more than `max_unsent_chars` unread."""
        self.answers = answers
        self.error: PenstockError | None = None
        self.gone = False
        self.first_token_at: float | None = None
        self._metrics = metrics
        self._observe_itl = metrics.inter_token_latency.observe
        self._streaming = streaming
        self._max_unsent_chars = max_unsent_chars
        self._on_overflow = on_overflow
        self._now = now
        self._tickets: dict[int, Ticket] = {}
        self._open = len(answers)
        self._queued = False
        self._changed: dict[Answer, None] = {}
        self._waiter: asyncio.Future[None] | None = None

    @property
    def ended(self) -> bool:
        return self._open == 0 or self.gone or self.error is not None

    def start(self, completer: Completer, requests: Sequence[Request]) -> None:
        """Submit one request per answer. Raises RequestRejected when one of them is not even queued."""
        self._metrics.queued.inc()
        self._queued = True
        for answer, request in zip(self.answers, requests, strict=True):
            ticket = completer.submit(request, partial(self._on_delta, answer), self.fail)
            self._tickets[answer.index] = ticket
            if self.ended or answer.finish_reason is not None:  # it came before the ticket did
                ticket.cancel()

    async def changed(self) -> list[Answer]:
        """Wait for news: the answers that have something new, or none when the call has ended.

        A call that does not stream has news when it ends."""
        if not (self._changed if self._streaming else self.ended) and not self.ended:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        changed = list(self._changed)
        self._changed.clear()
        return changed

    def hang_up(self) -> None:
        """The client is gone."""
        if not self.ended:
            self.gone = True
            self._end()

    def fail(self, error: PenstockError) -> None:
        """One choice's failure is the call's. Only the first counts, and none after the end."""
        if not self.ended:
            self.error = error
            self._end()

    def close(self) -> None:
        """Let go of all that still runs. Must be called in the end. Idempotent."""
        for ticket in self._tickets.values():
            ticket.cancel()
        self._tickets.clear()
        self._leave_queue()

    def _end(self) -> None:
        self.close()
        self._wake()

    def _on_delta(self, answer: Answer, delta: Delta) -> None:
        if answer.finish_reason is not None or self.error is not None or self.gone:
            return
        now = self._now()
        answer.feed(delta)
        self._observe(answer, len(delta.token_ids), now)
        self._changed[answer] = None
        if answer.finish_reason is not None:
            self._open -= 1
            ticket = self._tickets.pop(answer.index, None)
            if delta.finish_reason is None and ticket is not None:
                ticket.cancel()  # a stop string, which only we know of
        elif self._streaming and answer.unsent_chars > self._max_unsent_chars:
            self._on_overflow()
        if self._streaming or self._open == 0:
            self._wake()

    def _observe(self, answer: Answer, tokens: int, now: float) -> None:
        if tokens == 0:
            return
        before, answer.token_at = answer.token_at, now
        if before is not None:
            self._observe_itl((now - before) / tokens, tokens)
        elif self.first_token_at is None:
            self.first_token_at = now
            self._leave_queue()

    def _leave_queue(self) -> None:
        if self._queued:
            self._queued = False
            self._metrics.queued.dec()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
