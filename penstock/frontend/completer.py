"""The port to a router: what the frontend asks of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from penstock.core.attempt_times import AttemptTimes
from penstock.core.decision_record import RoutedRequest
from penstock.core.explanation import ExplainedRequest, Explanation
from penstock.core.misses import MissReport
from penstock.core.recording import Recording, RecordingWanted
from penstock.errors import PenstockError
from penstock.shapes import Delta, InstanceView, ModelView, Request, Role


class Ticket(Protocol):
    """A submitted request."""

    @property
    def attempts(self) -> Sequence[AttemptTimes]:
        """Those that were sent, in order. The same object for as long as the ticket is there, and after."""

    def explain(self) -> ExplainedRequest:
        """What was decided for it so far, and what happened."""

    def cancel(self, *, complete: bool = False) -> None:
        """Stop the engine's work on this request; no callbacks come any more. `complete`: the answer is
        complete, as opposed to abandoned. Idempotent."""


class Completer(Protocol):
    """Serves tokenized requests. Everything is called on the event loop, and returns at once."""

    def models(self) -> Mapping[str, ModelView]:
        """The models that can be served now, by each of their names; a model's own name is before its
        aliases."""

    def model(self, name: str) -> ModelView:
        """The model of this name or alias.

        Raises RequestRejected: NOT_FOUND for a model never seen, UNAVAILABLE while no worker has it."""

    def instances(self) -> list[InstanceView]:
        """All known instances."""

    def missing(self) -> Sequence[Role]:
        """The roles that are needed and that no connected instance has."""

    def discovery(self) -> str:
        """Why there may be instances that are not known here; empty when there are none."""

    def explain(self, name: str, tenant: str | None) -> Explanation:
        """What was decided for a call and what happened then, by the id of its answer, its x-request-id, or
        the router's name of one of its choices. `tenant`: whose it must be; None: anybody's.

        Raises RequestRejected(NOT_FOUND) when none of the requests that are kept has this name."""

    def misses(self, last_s: float) -> tuple[MissReport, Sequence[RoutedRequest]]:
        """A report on the requests of the last seconds, and what to give it: all that are kept. Making it
        takes too long for one turn of the event loop."""

    def foresee(self, request: Request) -> ExplainedRequest:
        """What would be decided for a request now. Nothing changes by it."""

    def record(self, wanted: RecordingWanted, tenant: str | None, on_more: Callable[[], None]) -> Recording:
        """Record what ends from now on, until `stop_recording`. Raises RequestRejected(OVERLOADED) while
        there are as many recordings as there may be."""

    def stop_recording(self, recording: Recording) -> None:
        """Its reader has left."""

    def check(self, model: str, tenant: str, priority: int) -> None:
        """Raises RequestRejected(OVERLOADED) when any request would have to wait too long."""

    def submit(
        self,
        request: Request,
        on_delta: Callable[[Delta], None],
        on_error: Callable[[PenstockError], None],
    ) -> Ticket:
        """Serve a request.

        Callbacks come from the event loop, one `on_delta` per engine step, the last with a
        finish_reason; or one `on_error` instead of it. None comes before this has returned.
        Raises RequestRejected when the request cannot be queued, or cannot be served. The requests of one
        `call_id` must come one directly after the other.
        """
