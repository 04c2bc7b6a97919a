"""The phases of an attempt inside an engine, from the engine's report of it."""

from __future__ import annotations

from typing import NamedTuple

from penstock.shapes import AttemptReport

MAX_MS = 1e9  # as the type of these times has it


class EnginePhase(NamedTuple):
    """One phase. Times in seconds of the report's clock."""

    name: str
    began_at: float
    ended_at: float

    @property
    def seconds(self) -> float:
        return self.ended_at - self.began_at


class EngineTimes(NamedTuple):
    """How long an attempt was in each phase, for its frontend."""

    queue_ms: float = 0.0
    transfer_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0


def phases(report: AttemptReport) -> list[EnginePhase]:
    """Those that it came to, in order: `queue` until it has KV blocks; `transfer`, where it pulls KV;
    `prefill` until the first token; `decode`, where there are more. The last one ends with the attempt."""
    begun = [
        (name, at)
        for name, at in (
            ("queue", report.submitted_at),
            ("transfer" if report.pulled_at is not None else "prefill", report.began_at),
            ("prefill", report.pulled_at),
            ("decode", report.first_token_at if report.output_tokens > 1 else None),
        )
        if at is not None
    ]
    ends = [*(at for _, at in begun[1:]), report.ended_at]
    return [EnginePhase(name, at, end) for (name, at), end in zip(begun, ends, strict=True)]


def engine_times(report: AttemptReport) -> EngineTimes:
    """The same as durations. None is below 0, whatever the engine's clocks say."""
    spent_ms = {phase.name: min(max(0.0, phase.seconds * 1e3), MAX_MS) for phase in phases(report)}
    return EngineTimes(*(spent_ms.get(name, 0.0) for name in ("queue", "transfer", "prefill", "decode")))
