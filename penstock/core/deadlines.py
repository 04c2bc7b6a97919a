"""The phases of a request, how long each may take, and how often a request may be tried again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from math import isfinite
from typing import Any

from penstock.checked import shown, suggestion
from penstock.errors import ConfigError


class Phase(Enum):
    """Where a request is. The value is the name of the phase's deadline in `--deadlines`."""

    QUEUED = "queue"  # no instance has it
    PREFILL = "prefill"  # a prefill worker computes its prompt
    TRANSFER = "transfer"  # a decode worker was handed its KV, and has said nothing yet
    FIRST_TOKEN = "first_token"  # a decode or aggregated worker computes its prompt
    DECODE = "stall"  # a worker generates
    DONE = "done"  # it has ended, and has no deadline


MISSING = {
    Phase.QUEUED: "no worker",
    Phase.PREFILL: "no prefill",
    Phase.TRANSFER: "no token after the KV transfer",
    Phase.FIRST_TOKEN: "no first token",
    Phase.DECODE: "no next token",
}
"""What has not come when a phase takes too long."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Limits of one request. `queue_s` and `request_s` end it; what else is late is tried again elsewhere,
    as often as an attempt may fail."""

    queue_s: float = 30.0
    """Seconds without any instance to send to, before 503: longer than a worker's restart. At first they
    count from when the frontend had read the request: tokenizing it is part of them."""

    prefill_s: float = 120.0
    """Seconds from sending a prompt to a prefill worker until its KV is ready, that engine's queue
    included: admission keeps it short (core/admission.py). Dead, frozen and stuck workers are noticed
    within seconds; this and the next two are for engines that lost a request."""

    transfer_s: float = 60.0
    """Seconds from handing KV to a decode worker to its first output: its queue, the pull (which the
    worker itself gives up after seconds, to compute the prompt) and a step."""

    first_token_s: float = 120.0
    """Seconds from sending a request to a worker that computes its prompt to the first output."""

    stall_s: float = 60.0
    """Seconds between two outputs of an attempt; long enough for a preempted request's return."""

    request_s: float = 1800.0
    """Seconds for the whole request, whatever happens."""

    max_attempts: int = 4
    """Attempts in a row that may fail without progress before the request does: one bad instance, a bad
    second choice, and a margin."""

    max_deaths: int = 3
    """Instances in a row that may die under a request without progress, if the last death points to it
    alone (core/suspects.py): it is stopped as the cause."""

    max_moves: int = 3
    """Times that a request leaves an instance which only stands still; then it stays where it is, so that
    no number of false alarms makes it fail."""

    max_bounces: int = 100
    """Refusals by full or leaving workers in a row, with no token between them, before a request is
    answered with 429."""

    handoff_margin_s: float = 1.0
    """A handoff with less life than this is not used: the pull could not finish."""

    def of(self, phase: Phase) -> float:
        """The deadline of this phase, in seconds from its beginning."""
        seconds: float = getattr(self, f"{phase.value}_s")
        return seconds


def parse_deadlines(text: str, otherwise: Deadlines) -> Deadlines:
    """`first_token=60,stall=20`, in seconds, as Deadlines; whatever it does not name is as in `otherwise`.

    Raises ConfigError, which names the flag and the phase."""
    names = [phase.value for phase in MISSING] + ["request"]
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (word.strip() for word in part.partition("="))
        if name not in names:
            hint = suggestion(name, names) or f"; one of {', '.join(names)}"
            raise ConfigError(f"--deadlines: unknown phase {shown(name)}{hint}")
        if f"{name}_s" in found:
            raise ConfigError(f"--deadlines: {name} is given twice")
        try:
            seconds = float(value)
        except ValueError:
            seconds = -1.0
        if not (equals and isfinite(seconds) and seconds > 0):
            raise ConfigError(f"--deadlines: {name}: expected seconds above 0, got {shown(value)}")
        found[f"{name}_s"] = seconds
    return replace(otherwise, **found)
