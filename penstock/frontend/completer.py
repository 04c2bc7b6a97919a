"""The port to a router: what the frontend asks of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from penstock.errors import PenstockError
from penstock.shapes import Delta, InstanceView, ModelView, Request, Role


class Ticket(Protocol):
    """A submitted request."""

    def cancel(self, *, complete: bool = False) -> None:
        """Stop the engine's work on this request; no callbacks come any more. `complete`: the answer is
        complete, as opposed to abandoned. Idempotent."""


class Completer(Protocol):
    """Serves tokenized requests. Everything is called on the event loop, and returns at once."""

    def models(self) -> list[ModelView]:
        """The models that can be served now."""

    def model(self, name: str) -> ModelView:
        """Raises RequestRejected: NOT_FOUND for a model never seen, UNAVAILABLE while no worker has it."""

    def instances(self) -> list[InstanceView]:
        """All known instances."""

    def missing(self) -> Sequence[Role]:
        """The roles that are needed and that no connected instance has."""

    def discovery(self) -> str:
        """Why there may be instances that are not known here; empty when there are none."""

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
