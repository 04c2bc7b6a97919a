"""What can happen to a request, and what is then to be done: the words between its state machine
(lifecycle.py) and whoever carries it out.
"""

from __future__ import annotations

import msgspec

from penstock.errors import RequestRejected
from penstock.shapes import Attempt, Delta, Handoff, Output

KILLER = "kills_workers"
"""The code of the error that ends a request for being the cause of workers' deaths."""


# --- events -------------------------------------------------------------------------------------


class Chosen(msgspec.Struct):
    """The router's answer to Choose. `prefill` is None when no prefill worker is to go first. `local`: nor
    does the decode worker read KV that is held for it: it computes all of the prompt."""

    decode: str
    prefill: str | None = None
    local: bool = False


class NoCandidate(msgspec.Struct):
    """The router's answer to Choose when no instance can take the request now."""

    reason: str


class Held(msgspec.Struct):
    """The router's answer to Choose when instances could take the request, but its turn has not come."""


class Refused(msgspec.Struct):
    """A queued request must not wait any longer."""

    error: RequestRejected


class Retry(msgspec.Struct):
    """Something changed: a queued request may ask again."""


class Bounced(msgspec.Struct):
    """`unsent`: it got no further than its link, which is full."""

    attempt_id: str
    reason: str
    unsent: bool = False


class TooLong(msgspec.Struct):
    """An attempt that cannot be sent to any instance, because it is longer than a frame of the link."""

    attempt_id: str
    reason: str


class InstanceLost(msgspec.Struct):
    """An instance is gone with all it had; attempts there are lost and handoffs void. `died`: what seems to
    have died (`Registration.incarnation`), unless it just left or fell silent. `alone`: no other request
    with as many deaths was on it."""

    instance_id: str
    reason: str
    died: str = ""
    alone: bool = False


class InstanceReady(msgspec.Struct):
    """An instance takes attempts, anew or again: another process with that name, one that goes on."""

    instance_id: str


class InstanceStuck(msgspec.Struct):
    """An instance stands still, and there are others. It may go on, but better not wait for that."""

    instance_id: str
    reason: str


class Tick(msgspec.Struct):
    """Time has passed. `queued`: the instance that has it advances, and has others waiting."""

    queued: bool = False


class ClientGone(msgspec.Struct):
    """Nobody wants the rest. `complete`: the answer ends here, at a stop string."""

    complete: bool = False


# --- effects ------------------------------------------------------------------------------------


class Choose(msgspec.Struct):
    """Ask the router. `handoff`: the prompt's KV is ready for pulling, only a decode worker that reads it
    is needed. `failed`: why the attempt before it failed, if one just did."""

    avoid: frozenset[str]
    handoff: Handoff | None = None
    failed: str = ""


class Send(msgspec.Struct):
    instance_id: str
    attempt: Attempt


class Cancel(msgspec.Struct):
    instance_id: str
    attempt_id: str


class Release(msgspec.Struct):
    """Let go of KV. `sent`: a decode worker knows of it, and may be reading."""

    instance_id: str
    handoff_id: str
    sent: bool = False


class Emit(msgspec.Struct):
    delta: Delta


class Fail(msgspec.Struct):
    error: RequestRejected


Event = (
    Chosen
    | NoCandidate
    | Held
    | Refused
    | Retry
    | Bounced
    | TooLong
    | InstanceLost
    | InstanceReady
    | InstanceStuck
    | Tick
    | ClientGone
    | Output
)
Effect = Choose | Send | Cancel | Release | Emit | Fail
