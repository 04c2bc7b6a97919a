"""What can happen to one request that is being served, and what is then to be done about it."""

from __future__ import annotations

import msgspec

from penstock.core.policy import Decision
from penstock.errors import RequestRejected
from penstock.shapes import Attempt, Delta, Incarnation, Output

KILLER = "kills_workers"
"""The code of the error that ends a request for being the cause of workers' deaths."""

REJECTED_BY_ENGINE = "rejected_by_engine"
"""The code of the error that ends a request which no engine of its model can serve."""


# --- events -------------------------------------------------------------------------------------


class Bounced(msgspec.Struct):
    """A worker refused the attempt. `unsent`: it did not leave, because the link is full."""

    attempt_id: str
    reason: str
    unsent: bool = False


class TooLong(msgspec.Struct):
    """The attempt cannot be sent to any instance, because it is longer than a frame of the link."""

    attempt_id: str
    reason: str


class InstanceLost(msgspec.Struct):
    """An instance is gone with all it had; attempts there are lost and handoffs void.

    `died`: the incarnation that seems to have died, unless the instance left or fell silent. `shared`: it
    had work of other frontends. `alone`: no other request of this frontend on it had seen as many deaths.
    """

    instance_id: str
    reason: str
    died: Incarnation | None = None
    shared: bool = False
    alone: bool = False


class InstanceStuck(msgspec.Struct):
    """The engine of an instance does not advance, and other instances could serve the request."""

    instance_id: str
    reason: str


class ClientGone(msgspec.Struct):
    """The client does not want the rest. `complete`: because the answer ends here, at a stop string."""

    complete: bool = False


# --- effects ------------------------------------------------------------------------------------


class NoteChoice(msgspec.Struct):
    """For metrics and the log: where the next attempt goes and why, how long the request waited for that in
    the queue, and why the attempt before it failed, if it did."""

    decision: Decision
    waited_s: float
    failed: str
    avoided: frozenset[str]


class SendAttempt(msgspec.Struct):
    instance_id: str
    attempt: Attempt


class CancelAttempt(msgspec.Struct):
    instance_id: str
    attempt_id: str


class ReleaseKv(msgspec.Struct):
    """Let a prefill worker free the KV that it holds. `sent`: a decode worker knows of the handoff, and may
    be reading."""

    instance_id: str
    handoff_id: str
    sent: bool = False


class DeliverOutput(msgspec.Struct):
    """Give the client new output. Always the last effect: the client may answer with ClientGone at once."""

    delta: Delta


class FailRequest(msgspec.Struct):
    """Tell the client that the request has failed."""

    error: RequestRejected


Event = Bounced | TooLong | InstanceLost | InstanceStuck | ClientGone | Output
Effect = NoteChoice | SendAttempt | CancelAttempt | ReleaseKv | DeliverOutput | FailRequest
