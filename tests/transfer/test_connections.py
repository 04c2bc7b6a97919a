from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from penstock.errors import RemoteError
from penstock.transfer.connections import Connections
from penstock.transfer.messages import StillHeld
from penstock.transfer.settings import TransferSettings
from penstock.transfer.stream import ConnectionLost, DeadlinePassed

SOON_S = 60.0
IDLE_S = 100.0


def soon() -> float:
    return time.monotonic() + SOON_S


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


@pytest.fixture
def address(listener) -> str:
    return f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def connections() -> Iterator[Connections]:
    connections = Connections(TransferSettings(max_idle_connections=2, idle_timeout_s=IDLE_S))
    yield connections
    connections.close()


def test_what_is_kept_is_reused_and_what_is_dropped_is_not(connections, address) -> None:
    assert connections.reuse(address) is None
    kept, dropped = connections.open(address, soon()), connections.open(address, soon())
    connections.drop(dropped)
    connections.keep(address, kept)
    assert connections.reuse("127.0.0.1:1") is None
    assert connections.reuse(address) is kept
    assert connections.reuse(address) is None
    connections.drop(kept)


def test_the_one_used_last_comes_first_and_the_oldest_of_too_many_goes(connections, address) -> None:
    streams = [connections.open(address, soon()) for _ in range(3)]
    for stream in streams:
        connections.keep(address, stream)
    assert connections.reuse(address) is streams[2]
    assert connections.reuse(address) is streams[1]
    assert connections.reuse(address) is None
    for stream in streams:
        connections.drop(stream)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lets pass more than half of the time for which the holder keeps an idle connection."""
    ahead = 0.0
    monkeypatch.setattr(
        "penstock.transfer.connections.time", SimpleNamespace(monotonic=lambda: time.monotonic() + ahead)
    )

    def pass_by() -> None:
        nonlocal ahead
        ahead += 0.6 * IDLE_S

    return pass_by


def test_one_that_the_holder_may_be_closing_is_not_reused(connections, address, later) -> None:
    connections.keep(address, connections.open(address, soon()))
    later()
    assert connections.reuse(address) is None


def test_connections_to_holders_that_never_come_back_do_not_gather(
    connections, listener, address, later
) -> None:
    gone = connections.open(address, soon())
    connections.keep(address, gone)
    other = connections.open(address, soon())
    later()
    connections.keep("127.0.0.1:2", other)
    accepted = listener.accept()[0]
    accepted.settimeout(SOON_S)
    assert accepted.recv(1) == b"", "the first was not closed"
    accepted.close()
    assert connections.reuse("127.0.0.1:2") is other
    connections.drop(other)


def test_one_that_the_holder_closed_is_not_reused(connections, listener, address) -> None:
    connections.keep(address, connections.open(address, soon()))
    listener.accept()[0].close()
    time.sleep(0.05)
    assert connections.reuse(address) is None


def test_a_deadline_that_has_passed_opens_nothing(connections, address) -> None:
    with pytest.raises(DeadlinePassed):
        connections.open(address, time.monotonic() - 1)


@pytest.mark.parametrize("address", ["", ":", "host:1", "127.0.0.1", "127.0.0.1:x", "[::1:1", "1.2.3:1"])
def test_what_is_no_address_is_an_error(connections, address: str) -> None:
    with pytest.raises(RemoteError):
        connections.open(address, soon())


def test_nobody_there_is_an_error(connections, listener, address) -> None:
    listener.close()
    with pytest.raises(ConnectionLost, match="cannot connect"):
        connections.open(address, soon())


def test_closing_cuts_what_is_busy_and_opens_no_more(connections, address) -> None:
    busy = connections.open(address, soon())
    closer = threading.Timer(0.1, connections.close)
    closer.start()
    with pytest.raises(ConnectionLost):
        busy.receive(StillHeld, soon())
    closer.join()
    connections.drop(busy)
    with pytest.raises(ConnectionLost, match="stopped"):
        connections.open(address, soon())


@pytest.mark.parametrize(
    "lie", ["", ":1", "127.0.0.1", "127.0.0.1:99999", "127.0.0.1:-1", "host:1", "::1:1"]
)
def test_what_is_no_address_is_not_dialled(connections, lie: str) -> None:
    with pytest.raises(RemoteError, match="not an IP address and port"):
        connections.open(lie, soon())
