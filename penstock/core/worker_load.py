"""Load: what a frontend may assume a worker has to do."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import msgspec

from penstock.shapes import Load

GAIN = 0.02
"""Weight of the latest attempt in the mean numbers of tokens that they bring."""


class _Sent(msgspec.Struct):
    """An attempt on its way: the worker's load does not include it yet."""

    seq: int
    uncached_tokens: int
    context_tokens: int


@dataclass(slots=True)
class WorkerLoad:
    """One worker's load as one frontend may assume it: what the worker last reported, plus what this
    frontend sent that the report does not include, plus what it has promised to send (a request whose
    prompt is still on a prefill worker). Without the last two, a burst between two reports would all go to
    the same worker.
    """

    reported: Load = field(default_factory=Load)
    on_the_way: deque[_Sent] = field(default_factory=deque)  # at most what one link has in flight
    booked: dict[str, int] = field(default_factory=dict)  # request id -> context tokens
    uncached_tokens: int = 0  # sums over on_the_way and booked
    context_tokens: int = 0
    sent: int = 0  # attempts since the link came up
    prompt_tokens: float = 0.0  # that an attempt gives it to compute: the mean of the last 50 or so
    output_tokens: float = 0.0  # of an attempt as expected, likewise

    def send(self, seq: int, uncached_tokens: int, context_tokens: int, output_tokens: float = 0.0) -> None:
        """A Generate left. `seq` as in wire/messages.py; tokens of its prompt that are to be computed
        there, all that it will have KV for, and its output as expected."""
        self.on_the_way.append(_Sent(seq, uncached_tokens, context_tokens))
        self.uncached_tokens += uncached_tokens
        self.context_tokens += context_tokens
        self.sent += 1
        gain = max(GAIN, 1 / self.sent)
        self.prompt_tokens += gain * (uncached_tokens - self.prompt_tokens)
        self.output_tokens += gain * (output_tokens - self.output_tokens)

    def report(self, seen: int, load: Load) -> None:
        """The worker's load arrived; it includes every Generate up to `seen`."""
        self.reported = load
        while self.on_the_way and self.on_the_way[0].seq <= seen:
            arrived = self.on_the_way.popleft()
            self.uncached_tokens -= arrived.uncached_tokens
            self.context_tokens -= arrived.context_tokens

    def book(self, request_id: str, context_tokens: int) -> None:
        """A request will decode there once its prefill is done. Booking again replaces the booking."""
        self.release(request_id)
        self.booked[request_id] = context_tokens
        self.context_tokens += context_tokens

    def release(self, request_id: str) -> None:
        """The booking was used (its Generate left) or is no longer wanted. Without one: ignored."""
        self.context_tokens -= self.booked.pop(request_id, 0)

    @property
    def requests(self) -> int:
        """How many attempts it has: those that it last reported, and those on their way to it."""
        return self.reported.running + self.reported.waiting + len(self.on_the_way)

    def assumed(self) -> Load:
        """The load to decide with. What is on its way or booked counts as waiting."""
        load, extra = self.reported, len(self.on_the_way) + len(self.booked)
        if not extra:
            return load
        return msgspec.structs.replace(
            load,
            waiting=load.waiting + extra,
            prefill_tokens=load.prefill_tokens + self.uncached_tokens,
            context_tokens=load.context_tokens + self.context_tokens,
        )
