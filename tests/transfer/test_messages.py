from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ProtocolError
from penstock.shapes import Incarnation
from penstock.transfer.messages import (
    LENGTH_BYTES,
    MAX_FRAME_BYTES,
    Done,
    Granted,
    Memory,
    Read,
    StillHeld,
    check_length,
    frame,
    parsed,
)

MESSAGES = [
    Read(1, "h", Incarnation("w-0", 1_700_000_000_000), b"\xff" * 16, 65536, [0, 5, 70_000], 1.5),
    Granted(),
    Granted(refused="used"),
    Granted(memory=Memory("w-0-1-ab", b"\0md", 2**47, 1000, [3, 1])),
    Done(),
    StillHeld(),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_frame_is_its_length_and_the_message(message) -> None:
    framed = frame(message)
    assert int.from_bytes(framed[:LENGTH_BYTES], "big") == len(framed) - LENGTH_BYTES
    assert parsed(type(message), framed[LENGTH_BYTES:]) == message


def test_a_long_prompt_fits_and_the_longest_frame_is_refused() -> None:
    read = Read(1, "h", Incarnation("w", 1), b"", 1, list(range(200_000)), 1.0)
    assert len(frame(read)) < MAX_FRAME_BYTES
    with pytest.raises(ProtocolError, match="at most"):
        frame(Granted(refused="x" * MAX_FRAME_BYTES))


@pytest.mark.parametrize("length", [0, MAX_FRAME_BYTES + 1, 2**32 - 1])
def test_lengths_that_no_frame_has(length: int) -> None:
    with pytest.raises(ProtocolError):
        check_length(length)


@given(st.binary(max_size=200), st.sampled_from([Read, Granted, Done, StillHeld]))
def test_any_bytes_are_a_message_or_a_protocol_error(body: bytes, kind: type) -> None:
    try:
        assert isinstance(parsed(kind, body), kind)
    except ProtocolError:
        pass


READ = [1, "h", {"instance_id": "w-0", "epoch": 1}, b"key", 65536, [0, 5], 1.5]
MEMORY = ["w-0-1-ab", b"md", 2**47, 1000, [3, 1]]


@pytest.mark.parametrize(
    ("kind", "place", "lie"),
    [(Read, 4, lie) for lie in (-1, 2**60)]
    + [(Read, 2, {"instance_id": "w-0", "epoch": lie}) for lie in (-1, 2**60)]
    + [(Read, 2, {"instance_id": lie, "epoch": 1}) for lie in ("", "x" * 300, "a\nb")]
    + [(Read, 1, lie) for lie in ("", "x" * 300, "a\nb")]
    + [(Read, 5, [-1]), (Read, 5, [2**40]), (Read, 3, b"x" * 2000)]
    + [(Read, 6, lie) for lie in (0.0, -1.0, float("nan"), float("inf"))]
    + [(Memory, 2, -1), (Memory, 2, 2**63), (Memory, 3, 0), (Memory, 3, -5), (Memory, 4, [-1])],
    ids=str,
)
def test_values_that_cannot_be_are_refused(kind: type, place: int, lie: object) -> None:
    said = list(READ if kind is Read else MEMORY)
    said[place] = lie
    body = msgspec.msgpack.encode(said if kind is Read else ["", said])
    with pytest.raises(ProtocolError, match=kind.__struct_fields__[place]):  # type: ignore[attr-defined]
        parsed(Read if kind is Read else Granted, body)


def test_what_is_nested_without_end_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError):
        parsed(StillHeld, b"\x91" * 100_000)
