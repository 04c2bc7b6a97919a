"""What a reader (R) and a holder (H) of KV blocks say to each other over one TCP connection.

    R  Read         a handoff and its key; which of its blocks
    H  Granted      from here on the blocks stay as they are; or why not
       ...          the bytes: with `tcp` they follow here, one block after another;
                    with `nixl` the reader fetches them one-sided, and then says
    R  Done         that it has them
    H  StillHeld    no block was let go before its last byte was read

A connection carries one such exchange after another. Each message is a frame: its length as 4 bytes,
big-endian, then msgpack. `StillHeld` is what makes a pull good: bytes alone prove nothing. With `tcp` it
follows from the holder keeping the blocks until its last byte is in the socket; with `nixl`, where a
holder cannot see what is read, from the grant still standing when `Done` arrives.

Both ends belong to one deployment, but the port is open: whoever connects without a key can make the
holder read one frame of at most `MAX_FRAME_BYTES`, within `request_timeout_s`. TLS would go around the
socket where `Stream` is made (`Server`, `Connections`); with it the bytes pass through user space.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from penstock.checked import field_path
from penstock.errors import ProtocolError
from penstock.shapes import MAX_POOL_BLOCKS, Count, Name, Text, Total, Word

PROTOCOL = 1
"""Whoever changes this renames the transports, too: frontends pair workers by their names, see
core/pairing.py."""

LENGTH_BYTES = 4
MAX_FRAME_BYTES = 1024 * 1024  # 200,000 block numbers: a prompt of 3 million tokens in blocks of 16


class Read(msgspec.Struct, array_like=True, frozen=True):
    """R: asks for blocks of a handoff. Granted once, whatever becomes of the read."""

    protocol: int
    handoff_id: Name
    instance_id: Name
    epoch: Total
    key: Annotated[bytes, Meta(max_length=1024)]
    block_bytes: Total
    indices: list[Count]  # into the handoff's blocks
    timeout_s: Annotated[float, Meta(gt=0, le=1e7)]  # the reader will have given up by then


class Memory(msgspec.Struct, array_like=True, frozen=True):
    """Where a one-sided reader finds the blocks."""

    agent: Word  # the holder's NIXL agent, one name per incarnation
    metadata: bytes  # its addresses and keys
    address: Annotated[int, Meta(ge=0, le=2**62)]  # of the pool in its memory
    total_blocks: Annotated[int, Meta(ge=1, le=MAX_POOL_BLOCKS)]
    rows: list[Count]  # of the pool, in the order of `Read.indices`


class Granted(msgspec.Struct, array_like=True, frozen=True):
    """H: answers a Read."""

    refused: Text = ""  # why not; empty: granted
    memory: Memory | None = None  # with `nixl`


class Done(msgspec.Struct, array_like=True, frozen=True):
    """R: has read everything (`nixl`)."""


class StillHeld(msgspec.Struct, array_like=True, frozen=True):
    """H: the blocks were held to the end."""


Message = Read | Granted | Done | StillHeld
M = TypeVar("M", Read, Granted, Done, StillHeld)


def frame(message: Message) -> bytes:
    """A message as it goes over the wire.

    Raises:
        ProtocolError: it is longer than any peer accepts.
    """
    body = msgspec.msgpack.encode(message)
    check_length(len(body))
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def check_length(length: int) -> None:
    """Raises ProtocolError for a length that no frame has."""
    if not 0 < length <= MAX_FRAME_BYTES:
        raise ProtocolError(f"a frame of {length} bytes; at most {MAX_FRAME_BYTES}")


def parsed(kind: type[M], body: bytes) -> M:
    """The message in a frame's body.

    Raises:
        ProtocolError: it is not a `kind`.
    """
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:  # ValueError: not UTF-8
        raise ProtocolError(f"not a {kind.__name__}: {field_path(str(error), kind)}") from error
