from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ProtocolError
from penstock.transfer import stream as stream_module
from penstock.transfer.messages import Granted, StillHeld
from penstock.transfer.stream import ConnectionLost, DeadlinePassed, Stream, pool_rows

SOON_S = 5.0


def soon() -> float:
    return time.monotonic() + SOON_S


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dialled = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
    with dialled, accepted:
        yield dialled, accepted


@pytest.fixture
def pair(sockets) -> tuple[Stream, Stream]:
    return Stream(sockets[0]), Stream(sockets[1])


def test_messages_and_rows_arrive_in_order(pair) -> None:
    near, far = pair
    rows = [memoryview(bytearray(b"abc")), memoryview(bytearray(b"defgh"))]
    near.send(Granted(refused="r"), soon(), more=True)
    near.send_rows(rows, soon())
    near.send(StillHeld(), soon())
    received = bytearray(8)
    assert far.receive(Granted, soon()) == Granted(refused="r")
    far.receive_rows([memoryview(received)[:2], memoryview(received)[2:]], soon())
    assert far.receive(StillHeld, soon()) == StillHeld()
    assert received == b"abcdefgh"


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_any_sizes_through_small_windows(pair, monkeypatch, seed: int) -> None:
    """Many system calls, short sends and short reads on both sides: nothing is lost or misplaced."""
    monkeypatch.setattr(stream_module, "_WINDOW_BYTES", 10_000)
    monkeypatch.setattr(stream_module, "_WINDOW_VIEWS", 7)
    rng = random.Random(seed)
    size = 5_000_000
    sent = memoryview(np.random.default_rng(seed).integers(0, 256, size, np.uint8).data)
    received = memoryview(bytearray(size))
    near, far = pair
    sender = threading.Thread(target=lambda: near.send_rows(cut(sent, rng), soon()))
    sender.start()
    far.receive_rows(cut(received, random.Random(seed + 1)), soon())
    sender.join()
    assert received == sent


def cut(whole: memoryview, rng: random.Random) -> list[memoryview]:
    views = []
    while whole:
        length = rng.choice([1, 100, 5_000, 100_000])
        views.append(whole[:length])
        whole = whole[length:]
    return views


def test_nothing_to_send_or_receive_needs_no_peer(pair) -> None:
    pair[0].send_rows([], soon())
    pair[0].receive_rows([], soon())


@pytest.mark.parametrize("sent", [b"", b"\0\0\0", b"\0\0\0\5abc"], ids=["nothing", "length", "part"])
def test_a_peer_that_falls_silent_costs_the_deadline(sockets, sent: bytes) -> None:
    sockets[0].sendall(sent)
    begun = time.monotonic()
    with pytest.raises(DeadlinePassed):
        Stream(sockets[1]).receive(StillHeld, begun + 0.2)
    assert time.monotonic() - begun > 0.19


def test_a_peer_that_takes_nothing_costs_the_deadline(pair) -> None:
    begun = time.monotonic()
    with pytest.raises(DeadlinePassed):
        pair[0].send_rows([memoryview(bytearray(64 << 20))], begun + 0.2)
    assert time.monotonic() - begun > 0.19


def test_a_peer_that_trickles_does_not_stretch_the_deadline(sockets) -> None:
    stop = threading.Event()

    def trickle() -> None:
        sockets[0].sendall((100).to_bytes(4, "big"))
        while not stop.wait(0.02):
            sockets[0].sendall(b"x")

    thread = threading.Thread(target=trickle)
    thread.start()
    begun = time.monotonic()
    with pytest.raises(DeadlinePassed):
        Stream(sockets[1]).receive(StillHeld, begun + 0.3)  # all of it would be there after 2 s
    stop.set()
    thread.join()


def test_a_closed_a_reset_and_a_cut_connection_are_lost(sockets) -> None:
    stream = Stream(sockets[1])
    sockets[0].sendall(b"\0\0")
    sockets[0].shutdown(socket.SHUT_WR)
    with pytest.raises(ConnectionLost, match="closed"):
        stream.receive(StillHeld, soon())
    sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sockets[0].close()
    with pytest.raises(ConnectionLost):
        stream.send_rows([memoryview(bytearray(1 << 20))], soon())
    stream.cut()  # what has ended cannot be cut; harmless


def test_cut_ends_a_call_in_another_thread(pair) -> None:
    timer = threading.Timer(0.1, pair[0].cut)
    timer.start()
    with pytest.raises(ConnectionLost):
        pair[0].receive(StillHeld, soon())
    timer.join()


def test_what_is_no_message_is_a_protocol_error(sockets) -> None:
    sockets[0].sendall(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(ProtocolError, match="frame"):
        Stream(sockets[1]).receive(StillHeld, soon())


def test_an_idle_connection_is_stale_once_closed_or_spoken_on(pair, sockets) -> None:
    assert not pair[0].is_stale()
    sockets[1].sendall(b"?")
    time.sleep(0.05)
    assert pair[0].is_stale()
    sockets[0].close()
    time.sleep(0.05)
    assert pair[1].is_stale()
    assert pair[0].is_stale()


@given(st.permutations(range(12)), st.integers(0, 12))
def test_pool_rows_are_the_blocks_in_order(order: list[int], count: int) -> None:
    flat = memoryview(bytes(block for block in range(12) for _ in range(5)))
    rows = pool_rows(flat, 5, order[:count])
    assert b"".join(rows) == bytes(block for block in order[:count] for _ in range(5))


def test_neighbours_share_a_view() -> None:
    flat = memoryview(bytes(100))
    assert [len(row) for row in pool_rows(flat, 10, [3, 4, 5, 1, 0, 9])] == [30, 10, 10, 10]
