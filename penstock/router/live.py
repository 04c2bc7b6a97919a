"""A submitted request that has not ended, with the router's records of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from penstock.core.admission import Queue
from penstock.core.lifecycle import Lifecycle, Phase
from penstock.core.placement import Placed
from penstock.core.policy import Decision
from penstock.core.suspects import CONFIRM_S
from penstock.errors import PenstockError
from penstock.shapes import Delta

OnDelta = Callable[[Delta], None]
OnError = Callable[[PenstockError], None]


@dataclass(slots=True, eq=False)
class Live:
    """One request of the router's."""

    lifecycle: Lifecycle
    on_delta: OnDelta
    on_error: OnError
    placed: Placed
    queue: Queue  # of its model's revision
    filed: Phase | None = None  # the phase that the router's books are up to date with
    suspect: bool = False  # it is noted among the suspects
    confirm_s: float = CONFIRM_S  # its wait after deaths
    broken: bool = False  # an error of ours has ended it
    attempt_ids: list[str] = field(default_factory=list)  # of those that were sent

    @property
    def given(self) -> int:
        """Output tokens so far."""
        return len(self.lifecycle.token_ids) - len(self.placed.request.token_ids)

    def fits(self, decision: Decision | None) -> bool:
        """Whether it would be sent now."""
        request_id = self.placed.request.request_id
        return decision is not None and self.queue.fits(request_id, decision.wait_ms, decision.crowded)
