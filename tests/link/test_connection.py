from __future__ import annotations

import asyncio
from typing import Any

import pytest

from penstock.errors import ProtocolError
from penstock.link.connection import Connection
from penstock.wire.frames import encode
from penstock.wire.messages import Ping

PING = encode(Ping())


class Owner:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def opened(self) -> None:
        self.calls.append("opened")

    def received(self, body: memoryview) -> None:
        self.calls.append(bytes(body))
        if bytes(body) == b"bad":
            raise ProtocolError("bad frame")

    def ended(self, reason: str) -> None:
        self.calls.append(("ended", reason))


def frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


@pytest.fixture
async def owner() -> Owner:
    return Owner()


@pytest.fixture
async def connection(owner: Owner) -> Connection:
    return Connection(owner, max_frame_bytes=100, max_unsent_bytes=1000)


@pytest.fixture
async def transport(bench: Any, connection: Connection) -> Any:
    transport = bench.transport(connection)
    transport.open()
    return transport


async def test_frames_in_order_then_one_end(owner: Owner, connection: Connection, transport: Any) -> None:
    connection.data_received(frame(b"one") + frame(b"two")[:3])
    connection.data_received(frame(b"two")[3:])
    connection.connection_lost(OSError("reset"))
    assert owner.calls == ["opened", b"one", b"two", ("ended", "connection lost: reset")]
    assert await connection.ended == "connection lost: reset"


async def test_hung_up(owner: Owner, connection: Connection, transport: Any) -> None:
    connection.data_received(frame(b"half")[:6])
    connection.connection_lost(None)
    assert owner.calls == ["opened", ("ended", "closed by the other side")]


@pytest.mark.parametrize(
    ("received", "reason"), [(frame(b"bad"), "bad frame"), (frame(bytes(101)), "a frame of 101 bytes")]
)
async def test_a_protocol_error_cuts_and_what_follows_is_not_delivered(
    owner: Owner, connection: Connection, transport: Any, received: bytes, reason: str
) -> None:
    connection.data_received(received + frame(b"later"))
    connection.data_received(frame(b"later"))
    assert transport.ending == "aborted"
    assert reason in await connection.ended
    assert b"later" not in owner.calls


async def test_nothing_is_written_before_it_opens_or_after_it_ends(bench: Any, owner: Owner) -> None:
    connection = Connection(owner, 100, 1000)
    connection.write(PING)
    assert not connection.usable
    transport = bench.transport(connection)
    transport.open()
    assert connection.usable
    connection.cut("enough")
    connection.write(PING)
    assert not connection.usable
    assert transport.written == b""


async def test_too_much_unsent_cuts(connection: Connection, transport: Any) -> None:
    transport.stuck = True
    for _ in range(1000 // len(PING)):
        connection.write(PING)
    assert connection.usable
    connection.write(PING)
    assert transport.ending == "aborted"
    assert "it does not read" in await connection.ended


async def test_held_bytes_count_as_unsent(connection: Connection, transport: Any) -> None:
    connection.check_unsent(1000)
    assert connection.usable
    connection.check_unsent(1001)
    assert not connection.usable


async def test_paced_frames_wait_for_the_network_and_others_overtake(bench: Any, owner: Owner) -> None:
    connection = Connection(owner, 100, 10_000_000)
    transport = bench.transport(connection)
    transport.open()
    transport.stuck = True
    parts = [bytes([number]) * 200_000 for number in range(4)]
    connection.write_paced(iter(parts[:3]))
    connection.write_paced(iter(parts[3:]))
    for _ in range(10):
        await asyncio.sleep(0)
    assert bytes(transport.written) == parts[0] + parts[1]  # above the high water after the second
    connection.write(PING)
    transport.unstick()
    for _ in range(10):
        await asyncio.sleep(0)
    assert bytes(transport.written) == parts[0] + parts[1] + PING + parts[2] + parts[3]


async def test_paced_frames_end_with_the_connection(connection: Connection, transport: Any) -> None:
    taken = []
    connection.write_paced(taken.append(number) or PING for number in range(100))
    await asyncio.sleep(0)
    connection.cut("enough")
    for _ in range(10):
        await asyncio.sleep(0)
    assert taken == [0]


async def test_an_orderly_close_keeps_its_reason(
    owner: Owner, connection: Connection, transport: Any
) -> None:
    connection.write(PING)
    connection.close("done")
    connection.cut("too slow to go")
    assert transport.ending == "aborted"
    assert await connection.ended == "done"
    assert owner.calls.count(("ended", "done")) == 1


async def test_received_bytes_end_the_silence_but_not_the_phase(
    connection: Connection, transport: Any
) -> None:
    connection.tick(1.5)
    connection.tick(1.5)
    assert (connection.silent_s, connection.phase_s) == (3.0, 3.0)
    connection.data_received(b"\x00")
    assert (connection.silent_s, connection.phase_s) == (0.0, 3.0)


async def test_the_end_is_told_even_when_the_owner_fails(
    connection: Connection, owner: Owner, caplog: pytest.LogCaptureFixture
) -> None:
    owner.ended = lambda reason: 1 / 0  # type: ignore[assignment]
    connection.connection_lost(None)
    assert connection.ended.done()
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("error", [ProtocolError("step.seen: 5"), ZeroDivisionError("a defect")])
async def test_what_a_message_raises_ends_its_connection_alone(
    connection: Connection, owner: Owner, transport: Any, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fail(body: memoryview) -> None:
        raise error

    owner.received = fail  # type: ignore[method-assign]
    connection.data_received(b"\0\0\0\3abc")
    assert transport.ending == "aborted"
    assert connection.misled is isinstance(error, ProtocolError)
    assert ("Traceback" in caplog.text) is not connection.misled
    assert str(error) in await connection.ended


async def test_rest_lasts_one_turn(connection: Connection, transport: Any) -> None:
    connection.rest()
    connection.rest()
    assert not transport.reading
    await asyncio.sleep(0)
    assert transport.reading
    connection.rest()
    connection.cut("enough")
    await asyncio.sleep(0)
    assert not transport.reading
