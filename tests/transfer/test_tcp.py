from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable

import pytest

from penstock.errors import ConfigError
from penstock.shapes import Incarnation
from penstock.transfer.messages import MAX_FRAME_BYTES, PROTOCOL, Granted, Read, frame
from penstock.transfer.stream import Stream
from penstock.transfer.tcp import TcpTransfer, TcpTransferSettings
from tests.builders import handoff
from tests.transfer import contract
from tests.waiting import wait_until

Worker, changed = contract.Worker, contract.changed
HOLDER = Incarnation("holder", 1)


def make_tcp(instance_id: str, **settings: object) -> TcpTransfer:
    return TcpTransfer(Incarnation(instance_id, 1), TcpTransferSettings(**settings))


def dial(worker: object) -> socket.socket:
    host, port = worker.transfer.address.split(":")
    return socket.create_connection((host, int(port)), timeout=contract.SOON_S)


def closed(connection: socket.socket, within_s: float = contract.SOON_S) -> bool:
    """Whether the other end closes, having sent nothing."""
    connection.settimeout(within_s)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


class TestTcpTransfer(contract.TransferContract):
    transport = "tcp"

    @pytest.fixture
    def make(self) -> Callable[..., TcpTransfer]:
        return make_tcp

    @pytest.mark.parametrize(
        "garbage",
        [
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            bytes(100),
            (MAX_FRAME_BYTES + 1).to_bytes(4, "big") + b"x",
            b"\0\0\0\5hello",
            b"\0\0\0\1\x90",
            frame(Granted()),
            frame(Read(PROTOCOL, "h", HOLDER, b"", 1, [], 1e9))[:-9] + b"\xcb" + b"\xff" * 8,
        ],
        ids=["http", "zeros", "too-long", "text", "empty-array", "other-message", "nan-timeout"],
    )
    def test_garbage_costs_its_connection_only(self, holder, reader, garbage: bytes) -> None:
        with dial(holder) as connection:
            connection.sendall(garbage)
            assert closed(connection)
        assert reader.pull(holder.export("h", [1]), [0], [1]).error is None

    def test_another_protocol_version_is_refused_in_words(self, holder) -> None:
        with dial(holder) as connection:
            stream = Stream(connection)
            deadline = time.monotonic() + contract.SOON_S
            stream.send(Read(PROTOCOL + 1, "h", HOLDER, b"", 1, [], 1.0), deadline)
            assert "protocol" in stream.receive(Granted, deadline).refused

    def test_silent_and_trickling_connections_are_cut(self, workers) -> None:
        holder = workers("holder", request_timeout_s=0.5)
        with dial(holder) as silent, dial(holder) as trickling:
            for _ in range(3):
                trickling.sendall(b"\0")
                time.sleep(0.05)
            assert closed(silent)
            assert closed(trickling)

    @pytest.fixture
    def holding(self) -> Callable[[], int]:
        """How many connections are served, other tests' left aside."""
        before = set(threading.enumerate())
        return lambda: sum(t.name == "kv-holder" for t in set(threading.enumerate()) - before)

    def test_a_crowd_of_strangers_keeps_no_reader_out(self, holding, workers, reader) -> None:
        holder = workers("holder", max_connections=4)
        holder.fill()
        assert reader.pull(holder.export("h0", [1]), [0], [1]).error is None
        strangers = [dial(holder) for _ in range(12)]
        try:
            assert holding() <= 4
            kept = reader.transfer._connections.reuse(holder.transfer.address)
            assert kept is not None, "the trusted connection was dropped for a stranger"
            reader.transfer._connections.keep(holder.transfer.address, kept)
            other = workers("other")
            assert other.pull(holder.export("h1", [1]), [0], [1]).error is None
        finally:
            for stranger in strangers:
                stranger.close()

    def test_one_connection_serves_pull_after_pull(self, holding, holder, reader) -> None:
        for number in range(5):
            assert reader.pull(holder.export(f"h{number}", [1]), [0], [1]).error is None
        assert holding() == 1

    def test_a_connection_that_the_holder_closed_is_replaced(self, workers, reader) -> None:
        holder = workers("holder", idle_timeout_s=0.2)
        assert reader.pull(holder.export("h1", [1]), [0], [1]).error is None
        time.sleep(0.5)
        assert reader.pull(holder.export("h2", [1]), [0], [1]).error is None

    def test_a_reader_that_stops_taking_bytes_holds_the_blocks_no_longer_than_allowed(
        self, workers
    ) -> None:
        holder = workers("holder", 64, 1 << 20, read_timeout_s=3.0)
        given = holder.export("h", list(range(64)))
        with dial(holder) as connection:
            stream = Stream(connection)
            read = Read(PROTOCOL, "h", HOLDER, given.params, 1 << 20, list(range(64)), 60.0)
            stream.send(read, time.monotonic() + contract.SOON_S)
            stream.receive(Granted, time.monotonic() + contract.SOON_S)
            assert not holder.transfer.retract("h")
            wait_until(lambda: holder.transfer.retract("h"))
        assert holder.pulled == []

    def test_a_reader_that_dies_lets_the_blocks_go_at_once(self, workers) -> None:
        holder = workers("holder", 64, 1 << 20)
        given = holder.export("h", list(range(64)))
        with dial(holder) as connection:
            stream = Stream(connection)
            read = Read(PROTOCOL, "h", HOLDER, given.params, 1 << 20, list(range(64)), 60.0)
            stream.send(read, time.monotonic() + contract.SOON_S)
            stream.receive(Granted, time.monotonic() + contract.SOON_S)
            assert not holder.transfer.retract("h")
        wait_until(lambda: holder.transfer.retract("h"))
        assert holder.pulled == []

    def test_a_holder_that_sends_all_but_says_nothing_has_proved_nothing(self, reader) -> None:
        """Every byte arrives, then the connection ends: without Held that is an error."""
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def impostor() -> None:
                connection, _ = listener.accept()
                stream = Stream(connection)
                stream.receive(Read, time.monotonic() + 5)
                stream.send(Granted(), time.monotonic() + 5)
                connection.sendall(os.urandom(contract.BLOCK_BYTES))
                connection.close()

            thread = threading.Thread(target=impostor)
            thread.start()
            address = f"127.0.0.1:{listener.getsockname()[1]}"
            pulled = reader.pull(handoff(instance_id="holder", address=address, params=b"k"), [0], [0])
            thread.join()
        assert "closed" in pulled.error
        assert pulled.blocks == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"host": "localhost"},
        {"host": "0.0.0.0"},
        {"host": "::"},
        {"advertise_host": "a name"},
        {"port": 65536},
        {"max_pulls": 0},
        {"read_timeout_s": 0.0},
        {"idle_timeout_s": float("inf")},
        {"request_timeout_s": float("nan")},
    ],
    ids=str,
)
def test_wrong_settings_refuse_to_start(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong)).split("_")[0]):
        TcpTransferSettings(**wrong)


def test_a_port_that_is_taken_refuses_to_start() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        transfer = make_tcp("holder", port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match="cannot listen"):
            transfer.start(memoryview(bytearray(64)).cast("B", (4, 16)), lambda handoff_id: None)
        transfer.stop()


def test_all_interfaces_with_an_address_to_dial() -> None:
    holder = Worker(make_tcp("holder", host="0.0.0.0", advertise_host="127.0.0.1"), "holder")
    reader = Worker(make_tcp("reader", host="::1"), "reader")
    try:
        assert reader.pull(holder.export("h", [1]), [0], [1]).error is None
        given = reader.export("h6", [1])
        assert given.address.startswith("[::1]:")
        assert holder.pull(given, [0], [1]).error is None
    finally:
        holder.transfer.stop()
        reader.transfer.stop()


@pytest.mark.parametrize(
    "pool",
    [
        memoryview(bytes(16)).cast("B", (4, 4)),
        memoryview(bytearray(16)),
        memoryview(bytearray(16)).cast("I"),
    ],
    ids=["read-only", "flat", "words"],
)
def test_a_pool_of_another_kind_is_a_mistake(pool: memoryview) -> None:
    with pytest.raises(ValueError, match="a pool is"):
        make_tcp("holder").start(pool, lambda handoff_id: None)
