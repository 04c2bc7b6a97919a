"""One client's call while the router serves it: all its choices, from submission to the last token."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial

from penstock.errors import PenstockError, RequestRejected
from penstock.frontend.choice import Choice
from penstock.frontend.completer import Completer, Ticket
from penstock.metrics import ModelMetrics
from penstock.shapes import Delta

Push = Callable[[Sequence[Choice]], bool]
"""Writes what is new of these choices at once; False when the rest must wait for the client."""


class LoopTurn:
    """Runs callbacks at the end of this turn of the event loop, after all that arrived in it was handled.
    So the tokens of several steps that were read together need one write per stream and one wake-up."""

    def __init__(self) -> None:
        self._due: list[Callable[[], None]] = []

    def at_end(self, callback: Callable[[], None]) -> None:
        """`callback` must not raise."""
        if not self._due:
            asyncio.get_running_loop().call_soon(self._run)
        self._due.append(callback)

    def _run(self) -> None:
        due, self._due = self._due, []
        for callback in due:
            callback()


class ClientCall:
    """Submits the requests of a call's choices, and wakes whoever writes the response.

    As long as a stream's reader keeps up, its chunks are written without waking its task (`push_with`):
    resuming a task through all its coroutines costs more than all else that is done for a token.

    Ends in one of three ways: every choice has its finish_reason, or `error` is set, or `gone` is set (the
    client has left). In the latter two, the requests that still ran have been cancelled.
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        *,
        metrics: ModelMetrics,
        streaming: bool,
        max_unsent_chars: int,
        on_overflow: Callable[[], None],
        turn: LoopTurn,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`on_overflow` is called when a stream's reader leaves more than `max_unsent_chars` of an answer
        unread. The call has ended then, and the connection must be dropped."""
        self.choices = choices
        self.error: PenstockError | None = None
        self.gone = False
        self.first_token_at: float | None = None
        self._metrics = metrics
        self._observe_itl = metrics.inter_token_latency.observe
        self._streaming = streaming
        self._max_unsent_chars = max_unsent_chars
        self._on_overflow = on_overflow
        self._now = now
        self._at_end_of_turn = turn.at_end
        self._push: Push | None = None
        self._push_due = False
        self._tickets: dict[int, Ticket] = {}
        self._open = len(choices)
        self._queued = False
        self._changed: dict[Choice, None] = {}
        self._waiter: asyncio.Future[None] | None = None

    @property
    def ended(self) -> bool:
        return self._open == 0 or self.gone or self.error is not None

    def start(self, completer: Completer) -> None:
        """Submit each choice's request. Raises RequestRejected when one of them is not even queued;
        `close` cancels those before it."""
        self._metrics.queued.inc()
        self._queued = True
        for choice in self.choices:
            if self.ended:
                return
            ticket = completer.submit(choice.request, partial(self._on_delta, choice), self.fail)
            self._tickets[choice.index] = ticket
            choice.attempts, choice.explain = ticket.attempts, ticket.explain

    def push_with(self, push: Push) -> None:
        """From now on call `push` with what is new while the writer waits in `changed`, which then returns
        only when `push` returned False, and at the end."""
        self._push = push

    async def changed(self) -> list[Choice]:
        """Wait until a choice has something new, or the call has ended, and return the choices that have
        something new. When the call does not stream, wait for its end."""
        news = self._changed if self._streaming else None
        if not news and not self.ended:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        changed = list(self._changed)
        self._changed.clear()
        return changed

    def hang_up(self) -> None:
        """The client has left."""
        if not self.ended:
            self.gone = True
            self._end()

    def fail(self, error: PenstockError) -> None:
        """End the call with this error, unless it has ended already."""
        if not self.ended:
            self.error = error
            self._end()

    def close(self) -> None:
        """Cancel the requests that still run. Must be called in the end. Idempotent."""
        for ticket in self._tickets.values():
            ticket.cancel()
        self._tickets.clear()
        self._leave_queue()

    def _end(self) -> None:
        self.close()
        self._wake()

    def _on_delta(self, choice: Choice, delta: Delta) -> None:
        if choice.finish_reason is not None or self.error is not None or self.gone:
            return
        now = self._now()
        try:
            choice.feed(delta)
        except RequestRejected as error:
            self.fail(error)
            return
        self._observe(choice, len(delta.token_ids), now)
        self._changed[choice] = None
        if choice.finish_reason is not None:
            self._open -= 1
            ticket = self._tickets.pop(choice.index, None)
            if delta.finish_reason is None and ticket is not None:
                ticket.cancel(complete=True)  # a stop string, which the engine does not know
        elif self._streaming and choice.unsent_chars > self._max_unsent_chars:
            self.hang_up()
            self._on_overflow()
        if self._open == 0 or (self._streaming and self._push is None):
            self._wake()
        elif self._streaming and not self._push_due:
            self._push_due = True
            self._at_end_of_turn(self._push_changed)

    def _push_changed(self) -> None:
        self._push_due = False
        waiter = self._waiter
        if waiter is None or waiter.done() or self._push is None or not self._changed:
            return  # the writer is awake, and takes what changed
        changed = list(self._changed)
        self._changed.clear()
        try:
            if not self._push(changed):
                self._wake()
        except Exception as error:  # noqa: BLE001 a bug of ours, for the call's own task to end with
            waiter.set_exception(error)

    def _observe(self, choice: Choice, tokens: int, now: float) -> None:
        if tokens == 0:
            return
        before, choice.token_at = choice.token_at, now
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
