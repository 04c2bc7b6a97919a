"""Which spans a request has in a trace, on its frontend and on its workers. They are built once, when it
has ended, from times that were kept anyway."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from penstock.core.attempt_phases import phases
from penstock.core.attempt_times import AttemptTimes
from penstock.shapes import AttemptReport, Output

Attributes = Mapping[str, str | int | float | bool]


class Span(msgspec.Struct):
    """One span with those below it. Times in seconds of the machine's monotonic clock."""

    name: str
    began_at: float
    ended_at: float
    attributes: Attributes = {}
    error: str = ""  # empty: it did not fail
    events: Sequence[tuple[str, float]] = ()  # name and time
    children: Sequence[Span] = ()


def request_span(
    name: str,
    began_at: float,
    ended_at: float,
    *,
    attributes: Attributes,
    error: str,
    read_at: float,
    tokenized_at: float | None,
    choices: Iterable[Sequence[AttemptTimes]],
) -> Span:
    """A request on its frontend: its tokenizing, then for each of its choices the waits for a worker and
    the attempts. `read_at`: from when these count; `tokenized_at`: None where it did not come to that."""
    children = []
    if tokenized_at is not None:
        children.append(Span("tokenize", read_at, tokenized_at))
    for attempts in choices:
        children += _choice_spans(attempts, read_at, tokenized_at or read_at, ended_at)
    return Span(name, began_at, ended_at, attributes, error, children=children)


def _choice_spans(
    attempts: Sequence[AttemptTimes], read_at: float, tokenized_at: float, ended_at: float
) -> Iterable[Span]:
    following = [*attempts[1:], None]
    for attempt, after in zip(attempts, following, strict=True):
        sent_at = read_at + attempt.sent_s
        names = {"penstock.attempt": attempt.attempt_id, "penstock.instance": attempt.instance_id}
        if attempt.queued_s is not None:
            yield Span("queue", max(read_at + attempt.queued_s, tokenized_at), sent_at, names)
        until, error = ended_at, ""
        if after is not None:
            waits_again = after.queued_s is not None
            until = read_at + (after.queued_s if after.queued_s is not None else after.sent_s)
            error = (after.retried_because or "it went on elsewhere") if waits_again else ""
        first_s = attempt.first_output_s
        events = [("first output", read_at + first_s)] if first_s is not None else []
        attributes: Attributes = {**names, "penstock.prefill_only": attempt.prefill_only}
        yield Span("attempt", sent_at, until, attributes, error, events)


def attempt_span(instance_id: str, output: Output, report: AttemptReport) -> Span:
    """An attempt on its worker, with its phases in the engine."""
    attributes: Attributes = {
        "penstock.attempt": report.attempt_id,
        "penstock.instance": instance_id,
        "penstock.finish_reason": str(output.finish_reason),
        "gen_ai.usage.output_tokens": report.output_tokens,
    }
    children = [Span(phase.name, phase.began_at, phase.ended_at) for phase in phases(report)]
    error = output.error or ""
    return Span("worker", report.submitted_at, report.ended_at, attributes, error, children=children)
