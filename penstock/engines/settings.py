"""How an engine shares its steps and blocks among attempts."""

from __future__ import annotations

import msgspec

from penstock.errors import ConfigError
from penstock.shapes import Incarnation


class SchedulerSettings(msgspec.Struct, frozen=True):
    """The scheduler's limits and waits, the same for every engine that uses it."""

    max_running: int = 256
    """Attempts that hold blocks at once. More share each step's weights, but each token takes longer."""

    max_batch_tokens: int = 2048
    """Tokens per step, decoding and prompts together. It bounds how long a prompt delays everybody else's
    next token: 2048 take about 100 ms for a 32B model on two H200."""

    handoff_ttl_s: float = 30.0
    """Seconds that a prefilled prompt is held for its reader: longer than a decode worker's queue usually
    is, and short enough that readers that died do not block the pool for long."""

    pull_timeout_s: float = 5.0
    """Seconds that a pull may take before the prompt is computed here instead; gigabytes take less."""

    holder: Incarnation = Incarnation("", 0)
    """Who has the blocks of handoffs that are made here."""

    def __post_init__(self) -> None:
        for name in ("max_running", "max_batch_tokens", "handoff_ttl_s", "pull_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be more than 0, got {getattr(self, name)}")
        if self.max_batch_tokens < self.max_running:
            raise ConfigError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be at least max_running"
                f" ({self.max_running}): each running attempt takes one token of a step"
            )
