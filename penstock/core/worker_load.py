"""Load: what a frontend may assume a worker has to do."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

import msgspec

from penstock.core.prompt_work import NO_WORK, PromptWork, part_of, prompt_work
from penstock.shapes import Load, Rates

GAIN = 0.02
"""Weight of the latest attempt in the mean numbers of tokens that they bring."""


class StepUnderWay(msgspec.Struct, frozen=True):
    """The step that a worker computes now."""

    elapsed_ms: float
    prompts: PromptWork
    """That it computes, of all that are left. What came since it began waits for the next one."""


class _Sent(msgspec.Struct):
    """An attempt on its way: the worker's load does not include it yet."""

    seq: int
    work: PromptWork
    context_tokens: int


@dataclass(slots=True)
class WorkerLoad:
    """One worker's load as one frontend may assume it: what the worker last reported, plus what this
    frontend sent that the report does not include, plus what it has promised to send (a request whose
    prompt is still on a prefill worker). Without the last two, a burst between two reports would all go to
    the same worker. Times in seconds of one clock.
    """

    reported: Load = field(default_factory=Load)
    on_the_way: deque[_Sent] = field(default_factory=deque)  # at most what one link has in flight
    booked: dict[str, int] = field(default_factory=dict)  # request id -> context tokens
    uncached_tokens: int = 0  # sums over on_the_way
    uncached_context_tokens: int = 0
    context_tokens: int = 0  # over on_the_way and booked
    sent: int = 0  # attempts since the link came up
    prompt_tokens: float = 0.0  # that an attempt gives it to compute: the mean of the last 50 or so
    prompt_context_tokens: float = 0.0  # that these attend to, likewise
    output_tokens: float = 0.0  # of an attempt as expected, likewise
    step_began_at: float = -math.inf  # as far as it is known
    step_prompts: PromptWork = NO_WORK  # what was left to compute of prompts when it began
    reports: int = 0
    rates: Rates | None = None  # to decide by, see core/pool_rates.py; None: the reported ones

    def send(
        self, seq: int, uncached_tokens: int, context_tokens: int, output_tokens: float, now: float
    ) -> None:
        """A Generate left. `seq` as in wire/messages.py; tokens of its prompt that are to be computed
        there, all that it will have KV for, and its output as expected."""
        work = prompt_work(context_tokens - uncached_tokens, context_tokens)
        if not self.requests:
            self.step_began_at, self.step_prompts = now, work
        self.on_the_way.append(_Sent(seq, work, context_tokens))
        self.uncached_tokens += work.tokens
        self.uncached_context_tokens += work.context_tokens
        self.context_tokens += context_tokens
        self.sent += 1
        gain = max(GAIN, 1 / self.sent)
        self.prompt_tokens += gain * (uncached_tokens - self.prompt_tokens)
        self.prompt_context_tokens += gain * (work.context_tokens - self.prompt_context_tokens)
        self.output_tokens += gain * (output_tokens - self.output_tokens)

    def report(self, seen: int, load: Load, now: float) -> None:
        """The worker's load arrived; it includes every Generate up to `seen`."""
        another_step = load.steps != self.reported.steps or not self.requests
        self.reported = load
        self.reports += 1
        while self.on_the_way and self.on_the_way[0].seq <= seen:
            arrived = self.on_the_way.popleft()
            self.uncached_tokens -= arrived.work.tokens
            self.uncached_context_tokens -= arrived.work.context_tokens
            self.context_tokens -= arrived.context_tokens
        if another_step:  # what is on its way has come by now, and is taken up with it
            self.step_began_at = now
            tokens = load.prefill_tokens + self.uncached_tokens
            context = load.prefill_context_tokens + self.uncached_context_tokens
            self.step_prompts = PromptWork(tokens, context) if tokens else NO_WORK

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

    @property
    def output_length(self) -> float:
        """Of an attempt, on average: it knows best itself, once some have ended there."""
        return self.reported.output_tokens or self.output_tokens

    def computed(self, step_tokens: int) -> PromptWork:
        """What the step under way computes of prompts, if it takes up so many tokens of them."""
        if not self.requests or not self.step_prompts.tokens:
            return NO_WORK
        left = self.reported.prefill_tokens + self.uncached_tokens
        context = self.reported.prefill_context_tokens + self.uncached_context_tokens
        tokens = min(self.step_prompts.tokens, step_tokens, left)
        return PromptWork(tokens, min(part_of(self.step_prompts, tokens).context_tokens, context))

    def step(self, step_tokens: int, now: float) -> StepUnderWay | None:
        """The step under way; None where the worker has nothing to do."""
        if not self.requests:
            return None
        return StepUnderWay((now - self.step_began_at) * 1e3, self.computed(step_tokens))

    def assumed(self) -> Load:
        """The load to decide with. What is on its way or booked counts as waiting."""
        load, extra = self.reported, len(self.on_the_way) + len(self.booked)
        rates = self.rates or load.rates
        if not extra:
            return load if rates is load.rates else msgspec.structs.replace(load, rates=rates)
        return msgspec.structs.replace(
            load,
            rates=rates,
            waiting=load.waiting + extra,
            prefill_tokens=load.prefill_tokens + self.uncached_tokens,
            context_tokens=load.context_tokens + self.context_tokens,
            prefill_context_tokens=load.prefill_context_tokens + self.uncached_context_tokens,
        )
