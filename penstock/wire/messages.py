"""The messages of the link, one msgspec Struct each, as msgpack with a `t` tag.

A connection, in order (F frontend, W worker):

    W  Challenge                who is there, and a nonce
    F  Hello                    the frontend, its nonce, and proof that it knows the secret
    W  Welcome                  the worker's Card, and its proof     (or Refused, then close)
    W  Snapshot ...             its cached block hashes, in chunks, `last` on the final one
    W  Step, Heartbeat          from here on ordered deltas to that snapshot; at least a Heartbeat a second
    F  Generate, Cancel, Release, AssetRequest, Ping        at least a Ping a second
    W  Bounce, Asset, Draining
    F, W  Goodbye                the last message of whoever leaves in order

Each `Generate` carries a `seq` that counts up from 1 on its connection; a `Step` or `Heartbeat` says the
highest one that its `load` already includes, so the frontend adds only what is still on its way.

A `Heartbeat` also says how many bytes have arrived at the worker. As long as that number grows, a long
prompt on a slow line is on its way; when it stands still, the path from frontend to worker is cut.

Fields are only added, with defaults; unknown fields and trailing ones are ignored. A new message, or a
new meaning of an old one, is a new protocol version, and versions do not mix.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from penstock.shapes import (
    Attempt,
    BlockHashes,
    Card,
    Count,
    Load,
    Name,
    Output,
    Seconds,
    Text,
    Total,
    Word,
)

PROTOCOL_VERSION = 2

MAX_OUTPUTS = 64 * 1024
"""Most attempts of one frontend that one step says something of."""

Nonce = Annotated[bytes, Meta(max_length=64)]
Proof = Annotated[bytes, Meta(max_length=64)]


class _Message(msgspec.Struct, tag_field="t", tag=str.lower, omit_defaults=True):
    """Base: tagged with the lower-cased class name."""


class Challenge(_Message):
    """W: the first bytes on a connection."""

    protocol: Count
    nonce: Nonce


class Hello(_Message):
    """F: answers a Challenge. `proof` as in wire/handshake.py."""

    protocol: Count
    frontend_id: Word  # what else it must be, and why not: wire/handshake.py
    nonce: Nonce
    proof: Proof


class Welcome(_Message):
    """W: accepts a Hello."""

    card: Card
    proof: Proof


class Refused(_Message):
    """W: rejects a Hello (version, secret, too many frontends), with the reason in words; the connection
    ends."""

    reason: Text


class Snapshot(_Message):
    """W: part of the set of sequence hashes that are cached now. The load that goes with the set is on
    the last part."""

    hashes: BlockHashes
    last: bool = False
    load: Load = Load()


class Step(_Message):
    """W: one engine step: this frontend's outputs, everybody's KV events and load."""

    seen: Total
    load: Load
    outputs: Annotated[list[Output], Meta(max_length=MAX_OUTPUTS)] = []
    stored: BlockHashes = []
    removed: BlockHashes = []
    cleared: bool = False


class Heartbeat(_Message):
    """W: still here, between steps, and the load as of now. `received`: bytes that have arrived on this
    connection; 0: not told."""

    seen: Total
    load: Load
    received: Total = 0


class Bounce(_Message):
    """W: will not take this attempt (full, draining, bad handoff...). Nothing of it remains here."""

    attempt_id: Name
    reason: Text
    retry_after_s: Seconds = 0.0


class Asset(_Message):
    """W: part of a file named by its sha256; `last` on the final part; `missing` when unknown."""

    sha256: Word
    data: bytes = b""
    last: bool = False
    missing: bool = False


class Draining(_Message):
    """W: takes no new attempts; what runs goes on."""

    reason: Text = ""


class Goodbye(_Message):
    """F, W: the last message: its sender is leaving. `failed` when it must, since its engine is gone."""

    reason: Text
    failed: bool = False


class Generate(_Message):
    """F: run this attempt."""

    seq: Total
    attempt: Attempt


class Cancel(_Message):
    """F: end this attempt. Its last Output is CANCELLED."""

    attempt_id: Name


class Release(_Message):
    """F: this handoff is of no use any more. `sent`: a decode worker knows of it, and may be reading."""

    handoff_id: Name
    sent: bool = False


class AssetRequest(_Message):
    """F: send the file with this sha256."""

    sha256: Word


class Ping(_Message):
    """F: still here; at least one a second."""


def halves(step: Step) -> tuple[Step, Step] | None:
    """Two steps that, one after the other, say the same as this one; None when it says only one thing."""
    removed, stored, outputs = len(step.removed), len(step.stored), len(step.outputs)
    half = (removed + stored + outputs) // 2
    if half == 0:
        return None
    of_stored = max(0, half - removed)  # all that is removed comes before what is stored, as in one step
    of_outputs = max(0, of_stored - stored)
    parts = {"removed": half, "stored": of_stored, "outputs": of_outputs}
    first = {name: getattr(step, name)[:end] for name, end in parts.items()}
    second = {name: getattr(step, name)[end:] for name, end in parts.items()}
    return msgspec.structs.replace(step, **first), msgspec.structs.replace(step, cleared=False, **second)


ToFrontend = (
    Challenge | Welcome | Refused | Snapshot | Step | Heartbeat | Bounce | Asset | Draining | Goodbye
)
ToWorker = Hello | Generate | Cancel | Release | AssetRequest | Ping | Goodbye
