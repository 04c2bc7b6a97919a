"""What vLLM serves, and how."""

from __future__ import annotations

import msgspec

from penstock.errors import ConfigError
from penstock.shapes import Incarnation, Role


class VllmSettings(msgspec.Struct, frozen=True):
    """Limits left at None are vLLM's own choice."""

    model: str
    """A folder, or a name that vLLM can download."""

    role: Role
    incarnation: Incarnation

    served_name: str = ""
    """What clients call the model; empty: the last part of its name."""

    host: str = "127.0.0.1"
    """Where decode workers ask for this instance's KV layout; they must be able to reach it."""

    kv_port: int = 0
    """The first of the ports where they ask, one for each data-parallel rank; 0: free ones."""

    kv_cache_bytes: int | None = None
    block_size: int | None = None
    max_model_len: int | None = None
    max_running: int | None = None
    max_batch_tokens: int | None = None

    handoff_ttl_s: float = 30.0
    """Seconds for which a prefilled prompt may still be pulled: longer than a decode worker's queue usually
    is, and short enough that readers that died do not block the cache for long."""

    engine_args: tuple[str, ...] = ()
    """vLLM's own flags, which win over the limits above."""

    events_delay_s: float = 0.01
    """How long KV events may wait for a step to travel with, in seconds: a fraction of most steps."""

    load_interval_s: float = 0.05
    """At least so long between two loads that nothing else happened to. vLLM takes hundreds of empty steps
    a second while it holds KV for others."""

    held_interval_s: float = 0.5
    """Between two looks at which handoffs are still held, while there are some."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("model: missing")
        if not self.handoff_ttl_s > 0:
            raise ConfigError(f"handoff_ttl_s must be more than 0, got {self.handoff_ttl_s}")
