"""Frames: any split of the stream gives the same bodies, and no input gives anything but ProtocolError."""

from __future__ import annotations

import itertools
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ProtocolError
from penstock.shapes import Attempt, Load, Output, Sampling
from penstock.wire.frames import FrameDecoder, decode_to_frontend, decode_to_worker, encode
from penstock.wire.messages import Asset, Cancel, Generate, Heartbeat, Ping, Refused, Snapshot, Step

MESSAGES = [
    Step(seen=3, load=Load(running=2), outputs=[Output("a", [1, 2]), Output("b", [3])], stored=[2**64 - 1]),
    Heartbeat(seen=0, load=Load()),
    Snapshot(hashes=list(range(200)), last=True),
    Asset(sha256="00", data=bytes(300), last=True),
    Refused(reason="no"),
]
GENERATE = Generate(seq=1, attempt=Attempt("a", "r", [5, 6, 7], 3, Sampling(max_tokens=4, seed=9)))


def pieces(stream: bytes, cuts: list[int]) -> list[bytes]:
    bounds = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    return [stream[start:end] for start, end in itertools.pairwise(bounds)]


def frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


@given(
    st.lists(st.binary(min_size=1, max_size=80), max_size=12), st.lists(st.integers(0, 2000), max_size=30)
)
def test_any_split_gives_the_same_bodies(bodies: list[bytes], cuts: list[int]) -> None:
    decoder = FrameDecoder(80)
    stream = b"".join(frame(body) for body in bodies)
    found = [bytes(body) for piece in pieces(stream, cuts) for body in decoder.feed(piece)]
    assert found == bodies
    assert decoder.held_bytes == 0


def test_byte_by_byte() -> None:
    decoder = FrameDecoder()
    stream = b"".join(encode(message) for message in MESSAGES)
    found = [body for i in range(len(stream)) for body in decoder.feed(stream[i : i + 1])]
    assert [decode_to_frontend(body) for body in found] == MESSAGES


def test_bodies_stay_valid_while_more_is_fed() -> None:
    decoder = FrameDecoder()
    first = decoder.feed(frame(b"one") + frame(b"two")[:5])[0]
    second = decoder.feed(frame(b"two")[5:] + b"\x00")[0]
    decoder.feed(b"\x00\x00\x09")
    assert (bytes(first), bytes(second)) == (b"one", b"two")


@pytest.mark.parametrize("length", [0, 81, 2**32 - 1])
def test_a_length_out_of_range_is_refused_at_its_fourth_byte(length: int) -> None:
    decoder = FrameDecoder(80)
    header = length.to_bytes(4, "big")
    assert decoder.feed(header[:3]) == []
    with pytest.raises(ProtocolError, match=f"a frame of {length} bytes"):
        decoder.feed(header[3:])


def test_the_longest_frame_passes() -> None:
    assert FrameDecoder(80).feed(frame(bytes(80))) == [bytes(80)]


def test_a_claimed_length_reserves_no_memory() -> None:
    decoder = FrameDecoder(2**31)
    tracemalloc.start()
    try:
        decoder.feed((2**31).to_bytes(4, "big") + bytes(1000))
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert max(held, peak) < 20_000


def test_a_frame_in_tiny_pieces_takes_little_more_than_its_bytes() -> None:
    decoder = FrameDecoder(2**20)
    decoder.feed((2**20).to_bytes(4, "big"))
    tracemalloc.start()
    try:
        for _ in range(100_000):
            decoder.feed(b"x")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 300_000


@given(st.binary(max_size=300))
def test_random_bytes_give_messages_or_protocol_errors(noise: bytes) -> None:
    for decode in (decode_to_frontend, decode_to_worker):
        try:
            decode(noise)
        except ProtocolError:
            pass
    decoder = FrameDecoder(100)
    try:
        for body in decoder.feed(noise):
            decode_to_worker(body)
    except ProtocolError:
        pass
    assert decoder.held_bytes <= 104


@given(st.sampled_from(MESSAGES), st.integers(0, 10**6), st.integers(0, 7), st.integers(0, 10**6))
def test_flipped_bits_and_cut_ends_give_messages_or_protocol_errors(
    message: object, where: int, bit: int, end: int
) -> None:
    body = bytearray(encode(message)[4:])  # type: ignore[arg-type]
    body[where % len(body)] ^= 1 << bit
    for mangled in (bytes(body), bytes(body[: end % len(body)])):
        try:
            decode_to_frontend(mangled)
        except ProtocolError:
            pass


@given(st.integers(0, 10**6), st.integers(0, 7))
def test_flipped_bits_in_a_generate(where: int, bit: int) -> None:
    body = bytearray(encode(GENERATE)[4:])
    body[where % len(body)] ^= 1 << bit
    try:
        decode_to_worker(bytes(body))
    except ProtocolError:
        pass


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",  # never used by msgpack
        b"\x81\xa1t\xa4none",  # no such message
        b"\x82\xa1t\xa6cancel\xaaattempt_id\xa2\xff\xfe",  # not UTF-8
        b"\x82\xa1t\xa4ping\xa1x" + b"\x91" * 1_000_000,  # a million lists in each other
        b"\x82\xa1t\xa6cancel\xaaattempt_id\xdb\xff\xff\xff\xff",  # a text of 4 GiB that is not there
        b"\x82\xa1t\xa8generate\xa3seq\xdd\xff\xff\xff\xff",
        encode(MESSAGES[0])[4:],  # right, but for the other side
    ],
)
def test_what_is_not_a_message_for_a_worker(body: bytes) -> None:
    with pytest.raises(ProtocolError, match="not a message"):
        decode_to_worker(body)


def test_an_error_quotes_nothing_that_could_fake_a_log_line() -> None:
    body = b"\x81\xa1t\xafx\n2026 ERROR fake"
    with pytest.raises(ProtocolError) as caught:
        decode_to_worker(body)
    assert "\n" not in str(caught.value)


def test_unknown_fields_are_ignored() -> None:
    assert decode_to_worker(b"\x82\xa1t\xa4ping\xa5later\x93\x01\x02\x03") == Ping()
    cancel = b"\x83\xa1t\xa6cancel\xaaattempt_id\xa1a\xa3why\xc0"
    assert decode_to_worker(cancel) == Cancel(attempt_id="a")
