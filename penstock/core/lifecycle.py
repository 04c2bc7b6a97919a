"""One request's life: attempts, deadlines, handoff, another try, the end.

Theory. A request is served by a chain of attempts, one at a time. What must survive an attempt is only
the tokens it already gave: the next attempt continues from prompt + tokens so far, as output, so
penalties, seeds, min_tokens and max_tokens go on as if nothing had happened (shapes.Attempt). Outputs
of any attempt but the current one are therefore noise: they are dropped, and KV they offer is released.

    phase     event                      next         effects
    --------  -------------------------  -----------  ------------------------------------------------
    QUEUED    placed, with prefill       PREFILL      SendAttempt(prefill attempt)
    QUEUED    placed, handoff held       TRANSFER     SendAttempt(with the handoff)
    QUEUED    placed, local              FIRST_TOKEN  ReleaseKv, SendAttempt
    QUEUED    failed                     DONE         ReleaseKv, FailRequest
    PREFILL   Output, prefilled          TRANSFER     SendAttempt(with handoff) to the decode worker,
                                                      DeliverOutput; QUEUED if that worker is gone
    on one    Output, no finish          DECODE       DeliverOutput
    on one    Output, stop or length     DONE         DeliverOutput
    on one    Output, rejected           DONE         FailRequest: no other instance would take it either
    on one    Output, error;             QUEUED       none; avoids that instance and, from the second time
              InstanceLost; phase late                on, rests (FailRequest after the limit:
                                                      core/suspects.py)
    on one    Output, cancelled          QUEUED       none; avoids that instance, which is leaving
    on one    InstanceStuck, up to       QUEUED       CancelAttempt; avoids that instance
              `max_moves` times
    on one    Bounced                    QUEUED       none; a handoff stays valid
    on one    TooLong                    DONE         FailRequest: it would be too long for every instance
    any       request deadline, queue    DONE         CancelAttempt, ReleaseKv, FailRequest
              deadline
    any       ClientGone                 DONE         CancelAttempt, ReleaseKv

"on one": on an instance, which is in PREFILL, TRANSFER, FIRST_TOKEN and DECODE. When a request is QUEUED,
core/dispatcher.py finds the instances for its next attempt (`place`), once `rests_until` is over. Every
phase has a deadline (core/deadlines.py): `deadline` says when `tick` must be called at the latest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec

from penstock.core.attempt_times import AttemptTimes
from penstock.core.deadlines import MISSING, Deadlines, Phase
from penstock.core.events import (
    KILLER,
    REJECTED_BY_ENGINE,
    Bounced,
    CancelAttempt,
    ClientGone,
    DeliverOutput,
    Effect,
    Event,
    FailRequest,
    InstanceLost,
    InstanceStuck,
    ReleaseKv,
    SendAttempt,
    TooLong,
)
from penstock.core.suspects import Strikes
from penstock.errors import Rejection, RequestRejected
from penstock.shapes import Attempt, Delta, FinishReason, Handoff, Incarnation, Output, Request

_DECODE = Phase.DECODE  # looked up with every token

REST_S = 1.0
"""Pause after the second death in a row under a request, doubling with each further one. A busy machine
takes a while to end many processes, and a request that meets them all looks like the cause; and a worker
that only lost its link is connected again by then. The dispatcher makes a pause up to twice as long, so
that requests of several frontends do not come back together."""

REST_MAX_S = 2.0


class Lifecycle:
    """The state machine of one request. Feed events to `handle`, carry out the effects in order."""

    __slots__ = (
        "_came_at",
        "_handoff_at",
        "_instance_id",
        "_limits",
        "_queue_deadline",
        "_request_deadline",
        "_sent_handoff",
        "attempt_id",
        "attempts",
        "avoided",
        "bounces",
        "complete",
        "deadline",
        "decode_id",
        "failed",
        "handoff",
        "history",
        "output_ids",
        "phase",
        "request",
        "rests_until",
        "since",
        "strikes",
        "trouble",
    )

    def __init__(self, request: Request, limits: Deadlines, now: float) -> None:
        self.request = request
        self.phase = Phase.QUEUED
        self.output_ids: list[int] = []  # the tokens generated so far
        self.deadline = now + limits.queue_s
        self.complete = False  # it has ended, and its output is all that there was to be
        self.trouble = ""  # why the last attempt ended, for logs and the final error
        self.failed = ""  # why the last attempt failed, if it did and no other one was placed since
        self.strikes = Strikes()
        self.attempts = 0  # so far, whose ids are `attempt_id_of(1)` and so on
        self.attempt_id = ""  # the current attempt; empty when there is none
        self.decode_id = ""  # during PREFILL: the instance that decodes afterwards
        self.handoff: Handoff | None = None  # received, and not yet given to a decode worker
        self.avoided: set[str] = set()  # instances that get no attempt while there are others
        self.bounces = 0  # since it last got on
        self.rests_until = -math.inf  # the next attempt is placed only after that
        self.since = now  # when the phase began, or the latest output came
        self.history: list[AttemptTimes] = []  # of the attempts that were sent
        self._came_at = now
        self._limits = limits
        self._queue_deadline = self.deadline
        self._request_deadline = now + limits.request_s
        self._instance_id = ""  # of the current attempt, or of the one that ended last
        self._handoff_at = 0.0
        self._sent_handoff: Handoff | None = None  # given to the current attempt, not yet pulled for sure

    @property
    def instance_id(self) -> str:
        """The instance that has the current attempt; empty when there is none."""
        return self._instance_id if self.attempt_id else ""

    @property
    def output_tokens(self) -> int:
        """Output tokens so far."""
        return len(self.output_ids)

    @property
    def tokens(self) -> int:
        """Of prompt and output so far."""
        return len(self.request.token_ids) + len(self.output_ids)

    @property
    def token_ids(self) -> list[int]:
        """Prompt and output so far, not to be changed: the request's own, as a prompt may be long, while
        there is no output."""
        prompt = self.request.token_ids
        return prompt + self.output_ids if self.output_ids else prompt

    def attempt_id_of(self, number: int) -> str:
        """The id of an attempt. They count from 1."""
        return f"{self.request.request_id}.{number}"

    def concerns(self, instance_id: str) -> bool:
        """Whether it has or will have anything there."""
        places = (self._instance_id, self.decode_id)
        handoffs = (self.handoff, self._sent_handoff)
        return instance_id in places or any(it and it.holder.instance_id == instance_id for it in handoffs)

    def waited_s(self, now: float) -> float:
        """For how long it has been in its phase; in DECODE, since the latest output."""
        return now - self.since

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event at `now` (seconds), return what to do. Nothing happens after DONE, except
        that KV offered too late is released."""
        return _HANDLERS[type(event)](self, event, now)

    # --- placing --------------------------------------------------------------------------------

    def place(self, decode: str, prefill: str | None, now: float, *, local: bool = False) -> list[Effect]:
        """Send the next attempt of a queued request. `prefill` is None when no prefill worker is to go
        first. `local`: nor does the decode worker read KV that is held for it: it computes all of the
        prompt."""
        if prefill is None:
            dropped = self._drop_handoff() if local else []
            return [*dropped, *self._send_decode(decode, now)]
        self.decode_id = decode
        return [*self._drop_handoff(), self._send(prefill, Phase.PREFILL, now)]

    def unplaced(self, reason: str) -> None:
        """No instance can take a queued request. The instances that it avoids may be the only ones that are
        left: better one of those than none."""
        self.avoided.clear()
        self.trouble = self.trouble or reason

    def fail(self, error: RequestRejected) -> list[Effect]:
        """End the request, for this reason."""
        effects = self._drop_handoff()
        self.phase = Phase.DONE
        self.attempt_id = ""
        return [*effects, FailRequest(error)]

    def _send_decode(self, instance_id: str, now: float) -> list[Effect]:
        self.decode_id = ""
        handoff, self.handoff = self.handoff, None
        effects: list[Effect] = []
        if handoff is not None:
            left_s = handoff.ttl_s - (now - self._handoff_at)
            if left_s < self._limits.handoff_margin_s:
                effects.append(ReleaseKv(handoff.holder.instance_id, handoff.handoff_id))
                handoff = None
            else:
                self._sent_handoff = handoff
                handoff = msgspec.structs.replace(handoff, ttl_s=left_s)
        phase = Phase.FIRST_TOKEN if handoff is None else Phase.TRANSFER
        effects.append(self._send(instance_id, phase, now, handoff))
        return effects

    def _send(
        self, instance_id: str, phase: Phase, now: float, handoff: Handoff | None = None
    ) -> SendAttempt:
        self.attempts += 1
        self.attempt_id = self.attempt_id_of(self.attempts)
        self._instance_id = instance_id
        prefill_only = phase is Phase.PREFILL
        times = AttemptTimes(self.attempt_id, instance_id, prefill_only, now - self._came_at)
        if self.phase is Phase.QUEUED:
            times.queued_s, times.retried_because = self.since - self._came_at, self.trouble
        self.history.append(times)
        self.failed = ""
        self._enter(phase, now)
        attempt = Attempt(
            attempt_id=self.attempt_id,
            request_id=self.request.request_id,
            token_ids=self.token_ids,
            prompt_len=len(self.request.token_ids),
            sampling=self.request.sampling,
            prefill_only=prefill_only,
            handoff=handoff,
            cache_salt=self.request.cache_salt,
            priority=self.request.priority,
            trace=self.request.trace,
        )
        return SendAttempt(instance_id, attempt)

    # --- what workers say -----------------------------------------------------------------------

    def on_output(self, output: Output, now: float) -> list[Effect]:
        """As `handle` with this output, for callers that must not lose a microsecond."""
        if output.attempt_id != self.attempt_id:
            return _release_late(output)
        reason = output.finish_reason
        if reason is None:
            self._sent_handoff = None
            self.output_ids += output.token_ids
            strikes, begins = self.strikes, self.phase is not _DECODE
            if begins:
                times = self.history[-1]
                times.first_output_s, times.cached_tokens = now - self._came_at, output.cached_tokens
            if strikes.count:
                if self.tokens >= strikes.acquitted_at:
                    strikes.acquit()
                    self._settle()
            elif begins:
                self._settle()
            # As `_enter` does, which would cost this more than all the rest.
            self.phase, self.since = _DECODE, now
            deadline, last = now + self._limits.stall_s, self._request_deadline
            self.deadline = deadline if deadline < last else last
            return [self._emit(output, None)] if output.token_ids else []
        self.attempt_id = ""
        times = self.history[-1]
        times.took = output.took
        if output.token_ids and times.first_output_s is None:
            times.first_output_s, times.cached_tokens = now - self._came_at, output.cached_tokens
        if reason is FinishReason.STOP or reason is FinishReason.LENGTH:
            self.output_ids += output.token_ids
            self.phase = Phase.DONE
            self.complete = True
            return [self._emit(output, reason)]
        if reason is FinishReason.PREFILLED and output.handoff is not None:
            self.output_ids += output.token_ids
            self.handoff, self._handoff_at = output.handoff, now
            emitted = self._emit(output, None)
            # The decode worker first: its pull may start while the client reads the first token.
            if self.decode_id:
                return [*self._send_decode(self.decode_id, now), emitted]
            self._queue(now)
            return [emitted]
        if reason is FinishReason.REJECTED:
            message = output.error or "the engine rejected this request"
            return self.fail(RequestRejected(message, code=REJECTED_BY_ENGINE))
        if reason is FinishReason.CANCELLED:  # not by this request, which would not listen any more
            effects = self._drop_handoff()
            return [*effects, *self._turned_away("handed back by a leaving worker", now, migrates=True)]
        # Tokens of a failed step were not committed by the engine; they are computed again.
        return self._lost(output.error or f"attempt ended as {reason}", now)

    def _settle(self) -> None:
        """It gets on: what went wrong before does not count any more."""
        self.bounces = 0
        self.avoided.clear()
        self.trouble = ""

    def _emit(self, output: Output, reason: FinishReason | None) -> DeliverOutput:
        cached = output.cached_tokens
        if cached is not None:
            # Whoever continues finds the request's own earlier work cached: not what the client means.
            begins = self.output_tokens == len(output.token_ids)
            cached = min(cached, len(self.request.token_ids)) if begins else None
        return DeliverOutput(
            Delta(output.token_ids, output.logprobs, reason, cached, output.prompt_logprobs)
        )

    def _on_bounced(self, event: Bounced, now: float) -> list[Effect]:
        if event.attempt_id != self.attempt_id:
            return []
        self.handoff, self._sent_handoff = self._sent_handoff, None  # a bounced attempt pulled nothing
        if not event.unsent:
            return self._turned_away(event.reason, now)
        queue_deadline = self._queue_deadline  # it has not left the queue
        self.history.pop()
        self._queue(now)
        self.deadline = self._queue_deadline = queue_deadline
        return []

    def _on_too_long(self, event: TooLong, now: float) -> list[Effect]:
        if event.attempt_id != self.attempt_id:
            return []
        message = f"The request is too long to be sent to a worker: {event.reason}."
        return self.fail(RequestRejected(message, code="request_too_long"))

    def _turned_away(self, reason: str, now: float, *, migrates: bool = False) -> list[Effect]:
        """This worker does not want it, or not any more. Nothing has failed: a rolling restart may do
        this more often than a request may fail."""
        self.bounces += 1
        self.trouble = f"{self._instance_id}: {reason}"
        if self.bounces > self._limits.max_bounces:
            return self.fail(
                RequestRejected(
                    f"every worker is full ({self.trouble})", kind=Rejection.OVERLOADED, retry_after_s=5.0
                )
            )
        if migrates:
            self.avoided.add(self._instance_id)
            self.failed = self.trouble
        self._queue(now)
        return []

    def _on_instance_lost(self, event: InstanceLost, now: float) -> list[Effect]:
        if event.instance_id == self.decode_id:
            self.decode_id = ""  # another is chosen when the handoff arrives
        if self.handoff is not None and self.handoff.holder.instance_id == event.instance_id:
            self.handoff = None
        if self._sent_handoff is not None and self._sent_handoff.holder.instance_id == event.instance_id:
            self._sent_handoff = None  # the decode worker recomputes by itself
        if event.instance_id != self._instance_id or not self.attempt_id:
            return []
        self.strikes.shared |= event.died is not None and event.shared
        return self._lost(event.reason, now, died=event.died, alone=event.alone)

    def _on_instance_stuck(self, event: InstanceStuck, now: float) -> list[Effect]:
        if event.instance_id == self.decode_id:
            self.decode_id = ""
        if event.instance_id != self._instance_id or not self.attempt_id:
            return []
        if self.strikes.moves >= self._limits.max_moves:
            return []
        self.strikes.moved(event.instance_id, event.reason, self.tokens)
        self.trouble = f"{self._instance_id}: {event.reason}"
        self.avoided.add(self._instance_id)
        self.failed = self.trouble
        effects = [*self._abandon(), *self._drop_handoff()]
        self._queue(now)
        return effects

    def _lost(
        self,
        reason: str,
        now: float,
        *,
        died: Incarnation | None = None,
        alone: bool = False,
        code: str = "",
    ) -> list[Effect]:
        strikes = self.strikes
        strikes.add(self._instance_id, reason, self.tokens, died=died)
        self.attempt_id = ""
        self.trouble = f"{self._instance_id}: {reason}"
        self.avoided.add(self._instance_id)
        effects = self._drop_handoff()
        if died is not None and strikes.is_cause(self._limits.max_deaths, alone=alone):
            killed = ", ".join(map(str, strikes.killed))
            message = f"stopped: {strikes.deaths} workers died computing it ({killed})"
            killer = RequestRejected(message, kind=Rejection.WORKERS_FAILED, code=KILLER)
            return [*effects, *self.fail(killer)]
        if strikes.failures >= self._limits.max_attempts:
            message = f"{len(strikes.reasons)} attempts failed: {'; '.join(strikes.reasons)}"
            kind = Rejection.TIMED_OUT if code else Rejection.WORKERS_FAILED
            failed = RequestRejected(message, kind=kind, code=code or "attempts_failed")
            return [*effects, *self.fail(failed)]
        self.failed = self.trouble
        self._queue(now)
        if died is not None or strikes.count > 1:
            self.rests_until = now
        # Many workers may be dying at once, each noticed by itself. With the next attempt at once this
        # request would be on one of those as well, and become a suspect.
        if strikes.deaths > 1:
            self.rests_until = now + min(REST_S * 2 ** (strikes.deaths - 2), REST_MAX_S)
        return effects

    def _queue(self, now: float) -> None:
        self.attempt_id = self._instance_id = self.decode_id = ""
        self._enter(Phase.QUEUED, now)
        self._queue_deadline = self.deadline

    # --- time and the client --------------------------------------------------------------------

    def _enter(self, phase: Phase, now: float) -> None:
        self.phase, self.since = phase, now
        self.deadline = min(now + self._limits.of(phase), self._request_deadline)

    def tick(self, now: float) -> list[Effect]:
        """A deadline may be over."""
        if now < self.deadline or self.phase is Phase.DONE:
            return []
        if now >= self._request_deadline:
            where = f" from {self._instance_id}" if self._instance_id else ""
            message = f"request took longer than {self._limits.request_s:g} s"
            message += f": {MISSING[self.phase]}{where} for {round(self.waited_s(now), 1):g} s"
            return [*self._abandon(), *self.fail(RequestRejected(message, kind=Rejection.TIMED_OUT))]
        if self.phase is Phase.QUEUED:
            message = f"no worker could take the request within {self._limits.queue_s:g} s"
            message += f" ({self.trouble or 'they were busy with others'})"
            return self.fail(
                RequestRejected(message, kind=Rejection.UNAVAILABLE, code="no_worker", retry_after_s=5.0)
            )
        late = f"{MISSING[self.phase]} within {self._limits.of(self.phase):g} s"
        return [*self._abandon(), *self._lost(late, now, code=f"{self.phase.value}_timeout")]

    def _on_client_gone(self, event: ClientGone, now: float) -> list[Effect]:
        if self.phase is Phase.DONE:
            return []
        effects = [*self._abandon(), *self._drop_handoff()]
        self.phase = Phase.DONE
        self.complete = event.complete
        return effects

    def _abandon(self) -> list[Effect]:
        if not self.attempt_id:
            return []
        effect = CancelAttempt(self._instance_id, self.attempt_id)
        self.attempt_id = ""
        return [effect]

    def _drop_handoff(self) -> list[Effect]:
        """Let go of KV that this request will not pull, or whose reader is not needed any more."""
        handoff, sent = self.handoff or self._sent_handoff, self.handoff is None
        self.handoff = self._sent_handoff = None
        if handoff is None:
            return []
        return [ReleaseKv(handoff.holder.instance_id, handoff.handoff_id, sent)]


def _release_late(output: Output) -> list[Effect]:
    """A forgotten attempt offers KV that nobody will pull."""
    if output.handoff is None:
        return []
    return [ReleaseKv(output.handoff.holder.instance_id, output.handoff.handoff_id)]


_HANDLERS: dict[type, Callable[[Lifecycle, Any, float], list[Effect]]] = {
    Output: Lifecycle.on_output,
    Bounced: Lifecycle._on_bounced,
    TooLong: Lifecycle._on_too_long,
    InstanceLost: Lifecycle._on_instance_lost,
    InstanceStuck: Lifecycle._on_instance_stuck,
    ClientGone: Lifecycle._on_client_gone,
}
