"""Frames: how messages lie in a byte stream.

    frame = length (uint32, big-endian, of the body) + body (one message, msgpack)

A length of zero and one over the limit are refused as soon as the four bytes are there, so a peer can
make a decoder hold at most one frame of the limit and one read beside it.
"""

from __future__ import annotations

from typing import TypeVar, get_args

import msgspec

from penstock.checked import field_path
from penstock.errors import ProtocolError
from penstock.wire.checks import check_attempt
from penstock.wire.messages import Generate, ToFrontend, ToWorker

MAX_FRAME_BYTES = 16 * 1024 * 1024
"""Longest body between peers that know each other: a prompt of three million tokens."""

LENGTH_BYTES = 4
_MAX_REASON_CHARS = 160

_encoder = msgspec.msgpack.Encoder()
_to_frontend: msgspec.msgpack.Decoder[ToFrontend] = msgspec.msgpack.Decoder(ToFrontend)
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_MessageT = TypeVar("_MessageT")


def encode(message: ToFrontend | ToWorker) -> bytes:
    """A message as one whole frame."""
    body = _encoder.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def decode_to_frontend(body: bytes | memoryview) -> ToFrontend:
    """The message in a frame's body, as a frontend reads it. Raises ProtocolError."""
    return _decode(_to_frontend, body)


def decode_to_worker(body: bytes | memoryview) -> ToWorker:
    """The message in a frame's body, as a worker reads it. Raises ProtocolError."""
    return _decode(_to_worker, body)


def _decode(decoder: msgspec.msgpack.Decoder[_MessageT], body: bytes | memoryview) -> _MessageT:
    try:
        message = decoder.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:  # ValueError: not UTF-8
        raise ProtocolError(f"not a message: {_complaint(error, body)}") from error
    if isinstance(message, Generate):
        check_attempt(message.attempt)
    return message


class _Tag(msgspec.Struct):
    t: str


def _complaint(error: Exception, body: bytes | memoryview) -> str:
    """What is wrong with a message, and in which field. It may quote the peer, and will be in a log."""
    try:
        tag = msgspec.msgpack.decode(body, type=_Tag).t
    except (msgspec.MsgspecError, ValueError, RecursionError):
        tag = ""
    text = field_path(str(error), _KINDS[tag]) if tag in _KINDS else str(error)
    return "".join(char if char.isprintable() else "?" for char in text[:_MAX_REASON_CHARS])


_KINDS = {kind.__name__.lower(): kind for kind in (*get_args(ToFrontend), *get_args(ToWorker))}


class FrameDecoder:
    """Cuts a stream of bytes into frame bodies.

    `max_frame_bytes` may be changed between calls: it is small until the peer has proved itself.
    """

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self.max_frame_bytes = max_frame_bytes
        self._partial = bytearray()  # the start of a frame that is not whole yet
        self._wanted = LENGTH_BYTES  # bytes that `_partial` needs before looking again is worthwhile

    @property
    def held_bytes(self) -> int:
        """Bytes of a frame whose rest has not arrived."""
        return len(self._partial)

    def feed(self, received: bytes) -> list[memoryview]:
        """The bodies that are whole now, in order, as views of the received bytes: nothing is copied
        but the start of a frame whose rest is still to come.

        Raises ProtocolError for a length that no frame may have; the stream cannot be read on from there.
        """
        if not self._partial:
            return self._split(received)
        self._partial += received
        if len(self._partial) < self._wanted:
            return []
        buffer, self._partial = self._partial, bytearray()
        return self._split(buffer)

    def _split(self, buffer: bytes | bytearray) -> list[memoryview]:
        view = memoryview(buffer)
        bodies = []
        start, end = 0, len(buffer)
        self._wanted = LENGTH_BYTES
        while end - start >= LENGTH_BYTES:
            body = start + LENGTH_BYTES
            length = int.from_bytes(view[start:body], "big")
            if not 0 < length <= self.max_frame_bytes:
                raise ProtocolError(f"a frame of {length} bytes, expected 1 to {self.max_frame_bytes}")
            if end - body < length:
                self._wanted = LENGTH_BYTES + length
                break
            start = body + length
            bodies.append(view[body:start])
        if start < end:
            self._partial += view[start:]
        return bodies
