"""The settings of a router, from a frontend's flags."""

from __future__ import annotations

from penstock.core.admission import AdmissionSettings
from penstock.core.deadlines import Deadlines, parse_deadlines
from penstock.core.settings import RouterSettings
from penstock.options.config import FrontendOptions


def router_settings(options: FrontendOptions) -> RouterSettings:
    """How a frontend with these options chooses workers. Raises ConfigError."""
    # Who may wait for its turn for so long may wait as long for a worker to come back.
    queue_s = max(Deadlines().queue_s, 2 * options.max_wait_ms / 1e3)
    return RouterSettings(
        policy=options.router_mode,
        disagg=options.disagg,
        expect=options.expected_roles,
        slo_itl_ms=options.slo_itl_ms,
        admission=AdmissionSettings(max_wait_ms=options.max_wait_ms),
        deadlines=parse_deadlines(options.deadlines, Deadlines(queue_s=queue_s)),
    )
