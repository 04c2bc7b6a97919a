"""Whether an engine advances.

Theory. An engine that has work takes turns, and says after each how many it has taken (`Load.steps`). One
whose count stands still although it has work is stuck: hung, frozen, or cut off without anybody noticing.
What a turn may take differs by a factor of 10,000 between a small model's next tokens and a long prompt on
a slow machine, so the patience is a fixed part and a multiple of what the worker's own measurements
(`Load.rates`) say that its next step takes. A stuck engine is taken to be so until it takes a turn.

    state      event                                 next
    ---------  ------------------------------------  ---------
    idle       has work                              advancing, from now on
    advancing  a turn                                advancing, from now on
    advancing  no work left                          idle
    advancing  no turn for longer than the patience  stuck
    stuck      a turn                                advancing or idle
"""

from __future__ import annotations

import msgspec

from penstock.shapes import Load


class ProgressLimits(msgspec.Struct, frozen=True):
    """How long an engine may stand still."""

    stuck_s: float = 2.0
    """Seconds beyond what its step is expected to take. With the time until somebody looks it makes less
    than 3 s; a machine with several times more work than cores makes a thread wait for a part of that."""

    step_factor: float = 4.0
    """How many times its expected duration a step may take: rates are averages."""

    first_steps: int = 4
    """So many steps compile, load and allocate what the later ones use."""

    first_s: float = 30.0
    """Seconds that such a step may take in addition."""

    measured_steps: int = 16
    """After so many steps the rates are measured ones (core/worker_load.py); before, a prompt's token may
    take `unmeasured_token_s`."""

    unmeasured_token_s: float = 0.005
    """Seconds per prompt token where nothing is known: a model of a billion parameters on a few cores."""

    batch_tokens: int = 2048
    """Largest step, in tokens, of an engine that does not say it."""


class Progress:
    """One engine's progress, as far as its reports tell. Times are seconds of one clock."""

    __slots__ = ("_batch_tokens", "_limits", "_load", "_since", "_stuck")

    def __init__(self, limits: ProgressLimits, batch_tokens: int = 0) -> None:
        self._limits = limits
        self._batch_tokens = batch_tokens or limits.batch_tokens
        self._load = Load()
        self._since = 0.0  # of its latest turn, or of when it got work after having none
        self._stuck = False

    def observe(self, load: Load, now: float) -> None:
        """The engine's load, as reported now."""
        before = self._load
        if load.steps != before.steps:
            self._since = now
            self._stuck = False
        elif not (before.running or before.waiting):
            self._since = now
        self._load = load

    def stuck_s(self, now: float) -> float:
        """For how many seconds it has stood still, if it is stuck; else 0."""
        still_s = now - self._since
        if not self._stuck:
            busy = self._load.running or self._load.waiting
            self._stuck = bool(busy) and still_s > self.patience_s()
        return still_s if self._stuck else 0.0

    def patience_s(self) -> float:
        """How long its present step may take."""
        limits, load = self._limits, self._load
        tokens = min(load.prefill_tokens, self._batch_tokens)
        rates = load.rates
        # Twice what is before a token on average: so much is before the last ones of a long prompt.
        step_s = 1e-3 * (
            rates.step_ms
            + rates.prefill_token_ms * tokens
            + rates.prefill_context_ms
            * 2
            * load.prefill_context_tokens
            * tokens
            / max(1, load.prefill_tokens)
            + rates.decode_request_ms * load.running
            + rates.decode_context_ms * load.context_tokens
        )
        patience_s = limits.step_factor * step_s
        if load.steps < limits.measured_steps:
            patience_s = max(patience_s, limits.unmeasured_token_s * tokens)
        if load.steps < limits.first_steps:
            patience_s += limits.first_s
        return patience_s + limits.stuck_s

    def describe(self, now: float) -> str:
        """What is known of it, for logs and /health."""
        load = self._load
        return (
            f"no step for {now - self._since:.1f} s: steps={load.steps} running={load.running}"
            f" waiting={load.waiting} prefill_tokens={load.prefill_tokens}"
        )


class PatientTime:
    """Seconds that do not pass while this process was itself held up: frozen, or busy for long. Nothing was
    heard then, and nobody else is to blame.

    Args:
        interval_s: at which `look` is called at the latest; the time passes by twice that at most from one
            call to the next.
    """

    __slots__ = ("_limit_s", "_looked_at", "seconds")

    def __init__(self, now: float, interval_s: float) -> None:
        self.seconds = 0.0  # as of the latest look
        self._looked_at = now
        self._limit_s = 2 * interval_s

    def look(self, now: float) -> float:
        """Let time pass until now. Returns `seconds`."""
        self.seconds += min(now - self._looked_at, self._limit_s)
        self._looked_at = now
        return self.seconds
