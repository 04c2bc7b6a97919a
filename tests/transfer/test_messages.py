from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ProtocolError
from penstock.transfer.messages import (
    LENGTH_BYTES,
    MAX_FRAME_BYTES,
    Done,
    Granted,
    Held,
    Memory,
    Read,
    check_length,
    frame,
    parsed,
)

MESSAGES = [
    Read(1, "h", "w-0", 1_700_000_000_000, b"\xff" * 16, 65536, [0, 5, 70_000], 1.5),
    Granted(),
    Granted(refused="used"),
    Granted(memory=Memory("w-0-1-ab", b"\0md", 2**47, 1000, [3, 1])),
    Done(),
    Held(),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_frame_is_its_length_and_the_message(message) -> None:
    framed = frame(message)
    assert int.from_bytes(framed[:LENGTH_BYTES], "big") == len(framed) - LENGTH_BYTES
    assert parsed(type(message), framed[LENGTH_BYTES:]) == message


def test_a_long_prompt_fits_and_the_longest_frame_is_refused() -> None:
    assert len(frame(Read(1, "h", "w", 1, b"", 1, list(range(200_000)), 1.0))) < MAX_FRAME_BYTES
    with pytest.raises(ProtocolError, match="at most"):
        frame(Granted(refused="x" * MAX_FRAME_BYTES))


@pytest.mark.parametrize("length", [0, MAX_FRAME_BYTES + 1, 2**32 - 1])
def test_lengths_that_no_frame_has(length: int) -> None:
    with pytest.raises(ProtocolError):
        check_length(length)


@given(st.binary(max_size=200), st.sampled_from([Read, Granted, Done, Held]))
def test_any_bytes_are_a_message_or_a_protocol_error(body: bytes, kind: type) -> None:
    try:
        assert isinstance(parsed(kind, body), kind)
    except ProtocolError:
        pass
