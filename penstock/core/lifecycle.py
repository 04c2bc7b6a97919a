"""One request's life: attempts, deadlines, handoff, another try, the end.

Theory. A request is served by a chain of attempts, one at a time. What must survive an attempt is only
the tokens it already gave: the next attempt continues from prompt + tokens so far, as output, so
penalties, seeds, min_tokens and max_tokens go on as if nothing had happened (structs.Attempt). Outputs
of any attempt but the current one are therefore noise: they are dropped, and KV they offer is released.

    phase     event                      next      effects
    --------  -------------------------  --------  ------------------------------------------------
    QUEUED    Chosen, with prefill       PREFILL   Send(prefill attempt)
    QUEUED    Chosen, without            DECODE    Send(attempt, with the handoff if one is held)
    QUEUED    Chosen, local              DECODE    Release, Send(attempt)
    QUEUED    NoCandidate, Held          QUEUED    none; whoever drives it asks again by Retry
    QUEUED    Refused                    DONE      Release, Fail
    QUEUED    Retry, also as the first   QUEUED    Choose
    PREFILL   Output, prefilled          DECODE    Send(attempt with handoff) to the decode worker, Emit
    PREFILL   Output, stop or length     DONE      Emit
    DECODE    Output, no finish          DECODE    Emit
    DECODE    Output, stop or length     DONE      Emit
    PREFILL,  Output, rejected           DONE      Fail: no other instance would take it either
    DECODE
    PREFILL,  Output, error;             QUEUED    Choose without that instance: the first time at once,
    DECODE    InstanceLost; phase late             then by Retry (Fail after the limit: core/suspects.py)
    PREFILL,  Output, cancelled          QUEUED    Choose without that instance, which is leaving
    DECODE
    PREFILL,  InstanceStuck, up to       QUEUED    Cancel, Choose without that instance
    DECODE    `max_moves` times
    PREFILL,  Bounced                    QUEUED    Choose; a handoff stays valid
    DECODE
    PREFILL,  TooLong                    DONE      Fail: it would be too long for every instance
    DECODE
    any       InstanceReady              same      none; that instance is not avoided any more
    any       request deadline, queue    DONE      Cancel, Release, Fail
              deadline
    any       ClientGone                 DONE      Cancel, Release

Every phase has a deadline (core/deadlines.py): `deadline` says when `Tick` must be called at the latest. An
Emit is always the last effect: whoever gets the delta may answer with ClientGone at once.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import msgspec

from penstock.core.deadlines import Awaited, Deadlines
from penstock.core.events import (
    KILLER,
    Bounced,
    Cancel,
    Choose,
    Chosen,
    ClientGone,
    Effect,
    Emit,
    Event,
    Fail,
    Held,
    InstanceLost,
    InstanceReady,
    InstanceStuck,
    NoCandidate,
    Refused,
    Release,
    Retry,
    Send,
    Tick,
    TooLong,
)
from penstock.core.suspects import Strikes
from penstock.errors import Rejection, RequestRejected
from penstock.shapes import Attempt, Delta, FinishReason, Handoff, Output, Request


class Phase(Enum):
    QUEUED = "queued"  # no instance has it
    PREFILL = "prefill"  # a prefill worker computes the prompt
    DECODE = "decode"  # a decode or aggregated worker has it, its prompt still to compute or pull
    DONE = "done"


_NEXT_TOKEN = Awaited.NEXT_TOKEN  # looked up with every token


REST_S = 0.5
"""Pause after the second death in a row under a request, doubling with each further one: a busy machine
takes that long to end many processes, and a request that meets them all looks like the cause."""

REST_MAX_S = 4.0


class Lifecycle:
    """The state machine of one request. Feed events to `handle`, carry out the effects in order."""

    __slots__ = (
        "_attempt_id",
        "_attempt_number",
        "_avoid",
        "_awaited",
        "_bounces",
        "_busy_waits",
        "_cached_reported",
        "_decode_id",
        "_failed",
        "_handoff",
        "_handoff_at",
        "_instance_id",
        "_limits",
        "_queue_deadline",
        "_request_deadline",
        "_rests_until",
        "_sent_handoff",
        "_since",
        "complete",
        "deadline",
        "phase",
        "request",
        "strikes",
        "token_ids",
        "trouble",
    )

    def __init__(self, request: Request, limits: Deadlines, now: float) -> None:
        self.request = request
        self.phase = Phase.QUEUED
        self.token_ids = list(request.token_ids)  # prompt + output so far
        self.deadline = now + limits.queue_s
        self.complete = False  # it has ended, and its output is all that there was to be
        self.trouble = ""  # why the last attempt ended, for logs and the final error
        self.strikes = Strikes()
        self._limits = limits
        self._queue_deadline = self.deadline
        self._request_deadline = now + limits.request_s
        self._attempt_number = 0
        self._attempt_id = ""  # the current attempt; empty when there is none
        self._instance_id = ""  # where it runs
        self._decode_id = ""  # during PREFILL: who decodes afterwards
        self._handoff: Handoff | None = None  # received, and not yet given to a decode worker
        self._handoff_at = 0.0
        self._rests_until = 0.0  # after several deaths
        self._sent_handoff: Handoff | None = None  # given to the current attempt, not yet pulled for sure
        self._avoid: set[str] = set()
        self._failed = ""  # why the last attempt failed, until somebody was asked for another
        self._bounces = 0
        self._awaited = Awaited.WORKER
        self._since = now  # when it began to wait for that
        self._busy_waits = 0
        self._cached_reported = False

    @property
    def places(self) -> tuple[str, str]:
        """The instance that has its current attempt, and the one that is to decode it; empty for none."""
        return self._instance_id if self._attempt_id else "", self._decode_id

    def concerns(self, instance_id: str) -> bool:
        """Whether it has or will have anything there."""
        places = (self._instance_id, self._decode_id)
        handoffs = (self._handoff, self._sent_handoff)
        return instance_id in places or any(it and it.instance_id == instance_id for it in handoffs)

    def avoids(self, instance_id: str) -> bool:
        """Whether it does not go there again."""
        return instance_id in self._avoid

    def waited_s(self, now: float) -> float:
        """For how long it has waited for what it waits for."""
        return now - self._since

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event at `now` (seconds), return what to do. Nothing happens after DONE, except
        that KV offered too late is released."""
        return _HANDLERS[type(event)](self, event, now)

    # --- placing --------------------------------------------------------------------------------

    def _choose(self) -> Choose:
        failed, self._failed = self._failed, ""
        return Choose(frozenset(self._avoid), handoff=self._handoff, failed=failed)

    def _on_chosen(self, event: Chosen, now: float) -> list[Effect]:
        if self.phase is not Phase.QUEUED:
            return []
        if event.prefill is None:
            dropped = self._drop_handoff() if event.local else []
            return [*dropped, *self._send_decode(event.decode, now)]
        self.phase = Phase.PREFILL
        self._decode_id = event.decode
        return [*self._drop_handoff(), self._send(event.prefill, now, prefill_only=True)]

    def _send_decode(self, instance_id: str, now: float) -> list[Effect]:
        self.phase = Phase.DECODE
        handoff, self._handoff = self._handoff, None
        effects: list[Effect] = []
        if handoff is not None:
            left_s = handoff.ttl_s - (now - self._handoff_at)
            if left_s < self._limits.handoff_margin_s:
                effects.append(Release(handoff.instance_id, handoff.handoff_id))
                handoff = None
            else:
                self._sent_handoff = handoff
                handoff = msgspec.structs.replace(handoff, ttl_s=left_s)
        effects.append(self._send(instance_id, now, handoff=handoff))
        return effects

    def _send(
        self, instance_id: str, now: float, *, prefill_only: bool = False, handoff: Handoff | None = None
    ) -> Send:
        self._attempt_number += 1
        self._attempt_id = f"{self.request.request_id}.{self._attempt_number}"
        self._instance_id = instance_id
        self._busy_waits = 0
        if prefill_only:
            self._await(Awaited.PREFILL, now)
        else:
            self._await(Awaited.FIRST_TOKEN if handoff is None else Awaited.TRANSFER, now)
        attempt = Attempt(
            attempt_id=self._attempt_id,
            request_id=self.request.request_id,
            token_ids=list(self.token_ids),
            prompt_len=len(self.request.token_ids),
            sampling=self.request.sampling,
            prefill_only=prefill_only,
            handoff=handoff,
            cache_salt=self.request.cache_salt,
            priority=self.request.priority,
            suspect_tokens=self.strikes.suspect_tokens(len(self.token_ids)),
        )
        return Send(instance_id, attempt)

    def _on_no_candidate(self, event: NoCandidate, now: float) -> list[Effect]:
        # Who was avoided for this request may be the only one left: better it than nobody.
        self._avoid.clear()
        self.trouble = self.trouble or event.reason
        return []

    def _on_held(self, event: Held, now: float) -> list[Effect]:
        return []

    def _on_refused(self, event: Refused, now: float) -> list[Effect]:
        return self._fail(event.error) if self.phase is Phase.QUEUED else []

    def _on_retry(self, event: Retry, now: float) -> list[Effect]:
        return [self._choose()] if self.phase is Phase.QUEUED and now >= self._rests_until else []

    # --- what workers say -----------------------------------------------------------------------

    def _on_output(self, output: Output, now: float) -> list[Effect]:
        if output.attempt_id != self._attempt_id:
            return _release_late(output)
        reason = output.finish_reason
        if reason is None:
            self._sent_handoff = None
            self.token_ids += output.token_ids
            strikes = self.strikes
            if strikes.count:
                if len(self.token_ids) >= strikes.acquitted_at:
                    strikes.acquit()
                    self._settle()
            elif self._awaited is not _NEXT_TOKEN:
                self._settle()
            # As `_await` does, which would cost this more than all the rest.
            self._awaited, self._since = _NEXT_TOKEN, now
            deadline, last = now + self._limits.stall_s, self._request_deadline
            self.deadline = deadline if deadline < last else last
            return [self._emit(output, None)] if output.token_ids else []
        self._attempt_id = ""
        if reason is FinishReason.STOP or reason is FinishReason.LENGTH:
            self.token_ids += output.token_ids
            self.phase = Phase.DONE
            self.complete = True
            return [self._emit(output, reason)]
        if reason is FinishReason.PREFILLED and output.handoff is not None:
            self.token_ids += output.token_ids
            self._handoff, self._handoff_at = output.handoff, now
            emitted = self._emit(output, None)
            # The decode worker first: its pull may start while the client reads the first token.
            if self._decode_id:
                return [*self._send_decode(self._decode_id, now), emitted]
            return [*self._queue(now), emitted]
        if reason is FinishReason.REJECTED:
            message = output.error or "the engine rejected this request"
            return self._fail(RequestRejected(message, code="rejected_by_engine"))
        if reason is FinishReason.CANCELLED:  # not by this request, which would not listen any more
            effects = self._drop_handoff()
            return [*effects, *self._turned_away("handed back by a leaving worker", now, migrates=True)]
        # Tokens of a failed step were not committed by the engine; they are computed again.
        return self._lost(output.error or f"attempt ended as {reason}", now)

    def _settle(self) -> None:
        """It gets on: what went wrong before does not count any more."""
        self._bounces = 0
        self._avoid.clear()
        self.trouble = ""

    def _emit(self, output: Output, reason: FinishReason | None) -> Emit:
        cached = None
        if not self._cached_reported and output.cached_tokens is not None:
            # Later attempts find the request's own earlier work cached: not what the client means.
            cached = min(output.cached_tokens, len(self.request.token_ids))
            self._cached_reported = True
        return Emit(Delta(output.token_ids, output.logprobs, reason, cached))

    def _on_bounced(self, event: Bounced, now: float) -> list[Effect]:
        if event.attempt_id != self._attempt_id:
            return []
        self._handoff, self._sent_handoff = self._sent_handoff, None  # a bounced attempt pulled nothing
        if not event.unsent:
            return self._turned_away(event.reason, now)
        queue_deadline = self._queue_deadline  # it has not left the queue
        effects = self._queue(now)
        self.deadline = self._queue_deadline = queue_deadline
        return effects

    def _on_too_long(self, event: TooLong, now: float) -> list[Effect]:
        if event.attempt_id != self._attempt_id:
            return []
        message = f"The request is too long to be sent to a worker: {event.reason}."
        return self._fail(RequestRejected(message, code="request_too_long"))

    def _turned_away(self, reason: str, now: float, *, migrates: bool = False) -> list[Effect]:
        """This worker does not want it, or not any more. Nothing has failed: a rolling restart may do
        this more often than a request may fail."""
        self._bounces += 1
        self.trouble = f"{self._instance_id}: {reason}"
        if self._bounces > self._limits.max_bounces:
            return self._fail(
                RequestRejected(
                    f"every worker is full ({self.trouble})", kind=Rejection.OVERLOADED, retry_after_s=5.0
                )
            )
        if migrates:
            self._avoid.add(self._instance_id)
            self._failed = self.trouble
        return self._queue(now)

    def _on_instance_lost(self, event: InstanceLost, now: float) -> list[Effect]:
        if event.instance_id == self._decode_id:
            self._decode_id = ""  # another is chosen when the handoff arrives
        if self._handoff is not None and self._handoff.instance_id == event.instance_id:
            self._handoff = None
        if self._sent_handoff is not None and self._sent_handoff.instance_id == event.instance_id:
            self._sent_handoff = None  # the decode worker recomputes by itself
        if event.instance_id != self._instance_id or not self._attempt_id:
            return []
        return self._lost(event.reason, now, died=event.died, alone=event.alone)

    def _on_instance_ready(self, event: InstanceReady, now: float) -> list[Effect]:
        self._avoid.discard(event.instance_id)
        return []

    def _on_instance_stuck(self, event: InstanceStuck, now: float) -> list[Effect]:
        if event.instance_id == self._decode_id:
            self._decode_id = ""
        if event.instance_id != self._instance_id or not self._attempt_id:
            return []
        if self.strikes.moves >= self._limits.max_moves:
            return []
        self.strikes.moved(event.instance_id, event.reason, len(self.token_ids))
        self.trouble = f"{self._instance_id}: {event.reason}"
        self._avoid.add(self._instance_id)
        self._failed = self.trouble
        return [*self._abandon(), *self._drop_handoff(), *self._queue(now)]

    def _lost(
        self, reason: str, now: float, *, died: str = "", alone: bool = False, code: str = ""
    ) -> list[Effect]:
        strikes = self.strikes
        strikes.add(self._instance_id, reason, len(self.token_ids), died=died)
        self._attempt_id = ""
        self.trouble = f"{self._instance_id}: {reason}"
        self._avoid.add(self._instance_id)
        effects = self._drop_handoff()
        if died and strikes.is_cause(self._limits.max_deaths, alone=alone):
            message = f"stopped: {strikes.deaths} workers died computing it ({', '.join(strikes.killed)})"
            killer = RequestRejected(message, kind=Rejection.WORKERS_FAILED, code=KILLER)
            return [*effects, *self._fail(killer)]
        if strikes.failures >= self._limits.max_attempts:
            message = f"{len(strikes.reasons)} attempts failed: {'; '.join(strikes.reasons)}"
            kind = Rejection.TIMED_OUT if code else Rejection.WORKERS_FAILED
            failed = RequestRejected(message, kind=kind, code=code or "attempts_failed")
            return [*effects, *self._fail(failed)]
        self._failed = self.trouble
        # Many workers may be dying at once, each noticed by itself. Going on to the next at once would lose
        # this request there too, and make a suspect of it; Retry comes when they are known to be gone.
        if strikes.deaths > 1:
            self._rests_until = now + min(REST_S * 2 ** (strikes.deaths - 2), REST_MAX_S)
        return [*effects, *self._queue(now, wait=bool(died) or strikes.count > 1)]

    def _queue(self, now: float, *, wait: bool = False) -> list[Effect]:
        self.phase = Phase.QUEUED
        self._attempt_id = self._instance_id = self._decode_id = ""
        self._await(Awaited.WORKER, now)
        self._queue_deadline = self.deadline
        return [] if wait else [self._choose()]

    # --- time and the client --------------------------------------------------------------------

    def _await(self, awaited: Awaited, now: float) -> None:
        """Wait for this from now on."""
        self._awaited, self._since = awaited, now
        self.deadline = min(now + self._limits.of(awaited), self._request_deadline)

    def _on_tick(self, event: Tick, now: float) -> list[Effect]:
        if now < self.deadline or self.phase is Phase.DONE:
            return []
        if now >= self._request_deadline:
            where = f" from {self._instance_id}" if self._instance_id else ""
            message = f"request took longer than {self._limits.request_s:g} s"
            message += f": {self._awaited.missing}{where} for {_seconds(self.waited_s(now))}"
            return [*self._abandon(), *self._fail(RequestRejected(message, kind=Rejection.TIMED_OUT))]
        if self.phase is Phase.QUEUED:
            message = f"no worker could take the request within {self._limits.queue_s:g} s"
            message += f" ({self.trouble or 'they were busy with others'})"
            return self._fail(
                RequestRejected(message, kind=Rejection.UNAVAILABLE, code="no_worker", retry_after_s=5.0)
            )
        started = self._awaited is Awaited.NEXT_TOKEN
        if event.queued and self._busy_waits < self._limits.busy_waits and not started:
            self._busy_waits += 1
            self.deadline = min(now + self._limits.of(self._awaited), self._request_deadline)
            return []
        late = f"{self._awaited.missing} within {self._limits.of(self._awaited):g} s"
        if self._busy_waits:  # the deadline alone would be a fraction of it
            late = f"{self._awaited.missing} for {_seconds(self.waited_s(now))}, in a queue that moved"
        return [*self._abandon(), *self._lost(late, now, code=f"{self._awaited.value}_timeout")]

    def _on_client_gone(self, event: ClientGone, now: float) -> list[Effect]:
        if self.phase is Phase.DONE:
            return []
        effects = [*self._abandon(), *self._drop_handoff()]
        self.phase = Phase.DONE
        self.complete = event.complete
        return effects

    def _abandon(self) -> list[Effect]:
        if not self._attempt_id:
            return []
        effect = Cancel(self._instance_id, self._attempt_id)
        self._attempt_id = ""
        return [effect]

    def _drop_handoff(self) -> list[Effect]:
        """Let go of KV that this request will not pull, or whose reader is not needed any more."""
        handoff, sent = self._handoff or self._sent_handoff, self._handoff is None
        self._handoff = self._sent_handoff = None
        return [Release(handoff.instance_id, handoff.handoff_id, sent)] if handoff is not None else []

    def _fail(self, error: RequestRejected) -> list[Effect]:
        effects = self._drop_handoff()
        self.phase = Phase.DONE
        self._attempt_id = ""
        return [*effects, Fail(error)]


def _seconds(seconds: float) -> str:
    return f"{round(seconds, 1):g} s"


def _release_late(output: Output) -> list[Effect]:
    """A forgotten attempt offers KV that nobody will pull."""
    if output.handoff is None:
        return []
    return [Release(output.handoff.instance_id, output.handoff.handoff_id)]


_HANDLERS: dict[type, Callable[[Lifecycle, Any, float], list[Effect]]] = {
    Chosen: Lifecycle._on_chosen,
    NoCandidate: Lifecycle._on_no_candidate,
    Held: Lifecycle._on_held,
    Refused: Lifecycle._on_refused,
    Retry: Lifecycle._on_retry,
    Output: Lifecycle._on_output,
    Bounced: Lifecycle._on_bounced,
    TooLong: Lifecycle._on_too_long,
    InstanceLost: Lifecycle._on_instance_lost,
    InstanceReady: Lifecycle._on_instance_ready,
    InstanceStuck: Lifecycle._on_instance_stuck,
    Tick: Lifecycle._on_tick,
    ClientGone: Lifecycle._on_client_gone,
}
