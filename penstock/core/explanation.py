"""What was decided for a request, and what then happened, in the shape that clients get (docs/use.md).

The structs below are that shape. Fields are only added. Times that are not known are null, as are
predictions of what was not predicted. Costs are named as the structs of core/costs.py and core/disagg.py
name them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from penstock.core.attempt_phases import EngineTimes
from penstock.core.attempt_times import AttemptTimes
from penstock.core.costs import Costs
from penstock.core.decision_record import Holder, Placing, RoutedRequest
from penstock.core.decision_words import decision_words, first_token_ms, plan_costs_ms, request_words
from penstock.core.disagg import Plan
from penstock.core.phase_prediction import predicted_phases


class ExplainedCandidate(msgspec.Struct):
    """A worker that could have decoded the request, and what that was predicted to cost."""

    instance_id: str
    chosen: bool
    path: str
    prefill: str | None  # the prefill worker that would have gone first
    cached_tokens: int
    uncached_tokens: int
    running: int  # requests there, as this frontend knew
    waiting: int
    prefill_tokens: int  # prompt tokens that they still had to compute
    first_token_ms: float
    total_ms: float
    costs_ms: dict[str, float]
    distrusted: str | None  # why its cached tokens are only what was sent to it; null: its events say them


class ExplainedPrefill(msgspec.Struct):
    """A prefill worker that was compared."""

    instance_id: str
    chosen: bool
    cached_tokens: int
    uncached_tokens: int
    running: int
    waiting: int
    prefill_tokens: int
    first_token_ms: float
    distrusted: str | None


class ExplainedHolder(msgspec.Struct):
    """The worker that had most of the prompt cached, where another one computed it."""

    instance_id: str
    cached_tokens: int
    passed_over: str


class ExplainedTimes(msgspec.Struct):
    """The phases of one decision, all its attempts together: as predicted, or as they were."""

    cached_tokens: int | None = None
    frontend_ms: float | None = None
    queue_ms: float | None = None
    prefill_ms: float | None = None
    transfer_ms: float | None = None
    decode_ms: float | None = None
    first_token_ms: float | None = None  # since it was sent
    output_tokens: float | None = None


class ExplainedAttempt(msgspec.Struct):
    """One attempt on one worker. Times of its engine are null until it has ended there."""

    attempt_id: str
    instance_id: str
    prefill_only: bool
    sent_ms: float  # since the frontend had read the call
    first_output_ms: float | None
    cached_tokens: int | None
    queue_ms: float | None
    transfer_ms: float | None
    prefill_ms: float | None
    decode_ms: float | None


class ExplainedDecision(msgspec.Struct):
    """One decision: where the request went, why, and what became of it there."""

    summary: str
    decided_ms: float  # since the frontend had read the call
    policy: str
    path: str
    decode: str
    prefill: str | None
    retried_because: str | None
    avoided: list[str]
    holder: ExplainedHolder | None
    predicted: ExplainedTimes
    actual: ExplainedTimes
    candidates: list[ExplainedCandidate]  # the cheapest first
    prefill_candidates: list[ExplainedPrefill]
    candidates_left_out: int
    attempts: list[ExplainedAttempt]


class ExplainedRequest(msgspec.Struct):
    """One choice of a call."""

    request_id: str
    client_id: str | None
    created: float | None  # seconds since 1970; null for a request that was not made
    model: str
    prompt_tokens: int
    outcome: str  # waiting, running, complete, failed, cancelled; or not_sent for one that was not made
    error: str | None
    output_tokens: int
    duration_ms: float | None
    summary: str
    decisions: list[ExplainedDecision]


class Explanation(msgspec.Struct):
    """What a frontend knows of one call."""

    id: str
    requests: list[ExplainedRequest]
    object: str = "explanation"


def explained(routed: RoutedRequest, policy: str, unix_s: float | None) -> ExplainedRequest:
    """`unix_s`: what to add to a time of the record for seconds since 1970; None: it was not made."""
    made = unix_s is not None
    placings = routed.placings()
    following = (*(it.attempts_before for it in placings[1:]), len(routed.attempts))
    decisions = [
        _decision(routed, placing, routed.attempts[placing.attempts_before : end], policy, made=made)
        for placing, end in zip(placings, following, strict=False)
    ]
    if decisions:
        decisions[0].predicted.frontend_ms = _rounded(routed.expected_wait_ms)
        if made and routed.ended_at is not None:
            decisions[-1].actual.output_tokens = routed.output_tokens
    facts, ended = routed.request, routed.ended_at
    return ExplainedRequest(
        request_id=facts.request_id,
        client_id=facts.client_id or None,
        created=round(routed.came_at + unix_s, 3) if unix_s is not None else None,
        model=facts.model,
        prompt_tokens=facts.prompt_tokens,
        outcome=outcome_of(routed) if made else "not_sent",
        error=routed.error or None,
        output_tokens=routed.output_tokens,
        duration_ms=_ms(ended - routed.came_at) if ended is not None else None,
        summary=request_words(routed, [decision.summary for decision in decisions], made=made),
        decisions=decisions,
    )


def outcome_of(routed: RoutedRequest) -> str:
    """How far it has come."""
    if routed.ended_at is None:
        return "running" if routed.kept else "waiting"
    if routed.error:
        return "failed"
    return "complete" if routed.complete else "cancelled"


def _decision(
    routed: RoutedRequest, placing: Placing, attempts: Sequence[AttemptTimes], policy: str, *, made: bool
) -> ExplainedDecision:
    decision = placing.decision
    plans = sorted(decision.plans, key=lambda plan: (plan.total_ms, plan.instance_id != decision.decode))
    prefills = sorted(decision.prefills, key=lambda costs: costs.ready_ms)
    return ExplainedDecision(
        summary=decision_words(routed.request, placing, policy, made=made),
        decided_ms=_ms(placing.at - routed.came_at),
        policy=policy,
        path=decision.path,
        decode=decision.decode,
        prefill=decision.prefill,
        retried_because=placing.retried_because or None,
        avoided=sorted(placing.avoided),
        holder=_holder(placing.holder) if placing.holder is not None else None,
        predicted=_predicted(placing),
        actual=_actual(placing, attempts) if made else ExplainedTimes(),
        candidates=[_candidate(plan, plan.instance_id == decision.decode) for plan in plans],
        prefill_candidates=[_prefill(it, it.candidate.instance_id == decision.prefill) for it in prefills],
        candidates_left_out=placing.plans_left_out,
        attempts=[_attempt(attempt) for attempt in attempts],
    )


def _holder(holder: Holder) -> ExplainedHolder:
    return ExplainedHolder(holder.instance_id, holder.tokens, holder.passed_over)


def _candidate(plan: Plan, chosen: bool) -> ExplainedCandidate:
    here = plan.here
    return ExplainedCandidate(
        instance_id=plan.instance_id,
        chosen=chosen,
        path=plan.path,
        prefill=plan.first.candidate.instance_id if plan.first is not None else None,
        first_token_ms=_rounded(first_token_ms(plan)),
        total_ms=_rounded(plan.total_ms),
        costs_ms={name: _rounded(value) for name, value in plan_costs_ms(plan).items()},
        **_figures(here),
    )


def _prefill(costs: Costs, chosen: bool) -> ExplainedPrefill:
    return ExplainedPrefill(
        instance_id=costs.candidate.instance_id,
        chosen=chosen,
        first_token_ms=_rounded(costs.ready_ms),
        **_figures(costs),
    )


def _figures(costs: Costs) -> Mapping[str, Any]:
    candidate = costs.candidate
    return {
        "cached_tokens": candidate.cached_tokens,
        "uncached_tokens": costs.uncached_tokens,
        "running": candidate.load.running,
        "waiting": candidate.load.waiting,
        "prefill_tokens": candidate.load.prefill_tokens,
        "distrusted": candidate.distrusted or None,
    }


def _predicted(placing: Placing) -> ExplainedTimes:
    plan, query = placing.decision.chosen, placing.decision.query
    phases = predicted_phases(query, plan)
    return ExplainedTimes(
        cached_tokens=placing.cached_tokens if query.handed is None else None,
        queue_ms=_rounded(phases.queue_ms),
        prefill_ms=_rounded(phases.prefill_ms),
        transfer_ms=_rounded(phases.transfer_ms),
        decode_ms=_rounded(phases.decode_ms),
        first_token_ms=_rounded(first_token_ms(plan)),
        output_tokens=_rounded(query.expected_output_tokens),
    )


def _actual(placing: Placing, attempts: Sequence[AttemptTimes]) -> ExplainedTimes:
    """Phases are sums over the attempts that have ended in their engines."""
    took = [EngineTimes(*attempt.took) for attempt in attempts if attempt.took is not None]
    first = attempts[0] if attempts else None
    first_s = first.first_output_s if first is not None else None
    cached = first.cached_tokens if first is not None and placing.decision.query.handed is None else None
    return ExplainedTimes(
        cached_tokens=cached,
        frontend_ms=_ms(placing.waited_s),
        queue_ms=_rounded(sum(it.queue_ms for it in took)) if took else None,
        prefill_ms=_rounded(sum(it.prefill_ms for it in took)) if took else None,
        transfer_ms=_rounded(sum(it.transfer_ms for it in took)) if took else None,
        decode_ms=_rounded(sum(it.decode_ms for it in took)) if took else None,
        first_token_ms=_ms(first_s - first.sent_s) if first is not None and first_s is not None else None,
    )


def _attempt(attempt: AttemptTimes) -> ExplainedAttempt:
    took = EngineTimes(*attempt.took) if attempt.took is not None else None
    first_s = attempt.first_output_s
    return ExplainedAttempt(
        attempt_id=attempt.attempt_id,
        instance_id=attempt.instance_id,
        prefill_only=attempt.prefill_only,
        sent_ms=_ms(attempt.sent_s),
        first_output_ms=_ms(first_s) if first_s is not None else None,
        cached_tokens=attempt.cached_tokens,
        queue_ms=_rounded(took.queue_ms) if took is not None else None,
        transfer_ms=_rounded(took.transfer_ms) if took is not None else None,
        prefill_ms=_rounded(took.prefill_ms) if took is not None else None,
        decode_ms=_rounded(took.decode_ms) if took is not None else None,
    )


def _ms(seconds: float) -> float:
    return _rounded(seconds * 1e3)


def _rounded(value: float) -> float:
    return round(value, 3)
