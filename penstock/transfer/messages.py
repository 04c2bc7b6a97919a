"""The messages between a reader (R) and a holder (H) of KV blocks, over one TCP connection.

    R  Read         asks for blocks of a handoff, and shows the handoff's key
    H  Granted      the holder keeps the blocks unchanged from here on; or why it refuses
       ...          with `tcp` the bytes follow here, one block after another;
                    with `nixl` the reader reads them from the holder's memory
    R  Done         with `nixl`: the reader has all bytes
    H  StillHeld    the holder kept every block until its last byte was read

A connection carries one such exchange after another. Each message is a frame: its length as 4 bytes,
big-endian, then msgpack. A pull succeeds only with `StillHeld`: the bytes alone do not prove that the
blocks were unchanged. With `tcp`, the holder keeps the blocks until its last byte is in the socket. With
`nixl`, the holder cannot see what is read; it sends `StillHeld` if the grant is still valid when `Done`
arrives.

Both ends belong to one deployment, but the port is open: a client without a key can make the holder read
one frame of at most `MAX_FRAME_BYTES`, within `request_timeout_s`. TLS could wrap the socket where `Server`
and `Connections` make a `Stream`; the bytes would then pass through user space.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from penstock.checked import field_path
from penstock.errors import ProtocolError
from penstock.shapes import MAX_POOL_BLOCKS, Count, Incarnation, Name, Text, Total, Word

PROTOCOL = 2
"""A new number needs new names of the transports as well, since frontends pair workers by these names (see
core/pairing.py), or a new number of the link's protocol: a frontend speaks only one of those."""

LENGTH_BYTES = 4
MAX_FRAME_BYTES = 1024 * 1024  # 200,000 block numbers: a prompt of 3 million tokens in blocks of 16


class Read(msgspec.Struct, array_like=True, frozen=True):
    """R: asks for blocks of a handoff. The holder grants it once, even if the read then fails."""

    protocol: int
    handoff_id: Name
    holder: Incarnation
    key: Annotated[bytes, Meta(max_length=1024)]
    block_bytes: Total
    indices: list[Count]  # into the handoff's blocks
    timeout_s: Annotated[float, Meta(gt=0, le=1e7)]  # after this the reader gives up


class Memory(msgspec.Struct, array_like=True, frozen=True):
    """Where the blocks are in the holder's memory, for a reader with `nixl`."""

    agent: Word  # name of the holder's NIXL agent, different for each incarnation
    metadata: bytes  # of the agent: its addresses and keys
    address: Annotated[int, Meta(ge=0, le=2**62)]  # of the KV pool in the holder's memory
    total_blocks: Annotated[int, Meta(ge=1, le=MAX_POOL_BLOCKS)]
    rows: list[Count]  # of the pool, in the order of `Read.indices`


class Granted(msgspec.Struct, array_like=True, frozen=True):
    """H: the answer to a Read."""

    refused: Text = ""  # why the holder refuses; empty: granted
    memory: Memory | None = None  # with `nixl`


class Done(msgspec.Struct, array_like=True, frozen=True):
    """R: the reader has read all blocks (`nixl` only)."""


class StillHeld(msgspec.Struct, array_like=True, frozen=True):
    """H: the holder kept the blocks to the end."""


Message = Read | Granted | Done | StillHeld
M = TypeVar("M", Read, Granted, Done, StillHeld)


def frame(message: Message) -> bytes:
    """Encode a message.

    Raises:
        ProtocolError: the message is longer than a peer accepts.
    """
    body = msgspec.msgpack.encode(message)
    check_length(len(body))
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def check_length(length: int) -> None:
    """Raises ProtocolError if no frame may have this length."""
    if not 0 < length <= MAX_FRAME_BYTES:
        raise ProtocolError(f"a frame of {length} bytes; at most {MAX_FRAME_BYTES}")


def parsed(kind: type[M], body: bytes) -> M:
    """Decode the body of a frame.

    Raises:
        ProtocolError: it is not a message of this kind.
    """
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:  # ValueError: not UTF-8
        raise ProtocolError(f"not a {kind.__name__}: {field_path(str(error), kind)}") from error
