"""How a frontend chooses workers, and how long it waits for what."""

from __future__ import annotations

import msgspec

from penstock.core.admission import AdmissionSettings
from penstock.core.deadlines import Deadlines
from penstock.core.policies import policy_named
from penstock.core.progress import ProgressLimits
from penstock.shapes import Role


class RouterSettings(msgspec.Struct, frozen=True):
    """How a router chooses and how long it waits. Raises ConfigError for a policy that is not there."""

    policy: str = "kv"
    """Name of the policy (core/policies.py)."""

    disagg: str = "auto"
    """`auto` weighs the costs, `always` uses a prefill worker whenever there is one, `never` does not."""

    expect: tuple[Role, ...] = ()
    """Roles that must be connected for the graph to be healthy."""

    slo_itl_ms: float = 25.0
    """The objective for each request's mean time between tokens, which costs count misses of; 0: none."""

    admission: AdmissionSettings = AdmissionSettings()

    tick_s: float = 0.1
    """Seconds between looks at deadlines and at queued requests: a small part of the shortest deadline."""

    look_s: float = 0.01
    """Seconds at least between looks at queued requests because of a worker's report, however many workers
    report: less than an engine's step."""

    load_retry_s: float = 5.0
    """Seconds before an instance whose model files could not be fetched, or differ, is tried again."""

    deadlines: Deadlines = Deadlines()

    progress: ProgressLimits = ProgressLimits()

    def __post_init__(self) -> None:
        policy_named(self.policy)
