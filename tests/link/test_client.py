"""The client against workers that are not there, not well, or not workers."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from penstock.clock import VirtualClock
from penstock.errors import ConfigError, RemoteError
from penstock.link.client import LinkClient
from penstock.link.settings import ClientSettings
from penstock.shapes import Incarnation
from tests.waiting import WITHIN_S

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def listen(serve: Serve) -> tuple[asyncio.Server, str]:
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    return server, f"{host}:{port}"


class Recorder(VirtualClock):
    """A clock that does not wait, and writes down how long it should have."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.slept: list[float] = []
        self.limit = limit

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        if len(self.slept) == self.limit:
            raise asyncio.CancelledError


def client_of(address: str, listener: Any, **options: Any) -> LinkClient:
    return LinkClient(address, listener, ClientSettings(), frontend_id="f1", **options)


async def test_pauses_double_to_a_limit_and_are_jittered(bench: Any, caplog: Any) -> None:
    clock = Recorder(limit=10)
    client = client_of("127.0.0.1:1", bench.listener(), rng=random.Random(3), clock=clock)
    with pytest.raises(asyncio.CancelledError):
        await client.run()
    nominal = [min(0.1 * 2**number, 2.0) for number in range(10)]
    assert all(full / 2 <= slept <= full for slept, full in zip(clock.slept, nominal, strict=True))
    assert len(set(clock.slept[-3:])) == 3
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1


async def test_a_worker_that_may_be_starting_is_no_reason_to_warn(bench: Any, caplog: Any) -> None:
    client = client_of("127.0.0.1:1", bench.listener(), starting=True, clock=Recorder(limit=3))
    with pytest.raises(asyncio.CancelledError):
        await client.run()
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []
    assert "cannot connect" in client.reason


async def test_many_failures_do_not_overflow(bench: Any) -> None:
    client = client_of("127.0.0.1:1", bench.listener())
    assert client._pause_s(10**6, False, False) <= 5.0
    assert 15.0 <= client._pause_s(1, True, False) <= 30.0


async def test_down_before_it_is_up(bench: Any) -> None:
    client = client_of("127.0.0.1:1", bench.listener())
    for send in (
        lambda: client.generate(bench.attempt()),
        lambda: client.cancel("a"),
        lambda: client.release("h", sent=False),
    ):
        with pytest.raises(RemoteError, match=r"127\.0\.0\.1:1 is down: not connected yet"):
            send()


@pytest.mark.parametrize("said", [b"SSH-2.0-OpenSSH_9\r\n", b"\x00\x00\x00\x01\xc1", b""])
async def test_something_else_listens_there(bench: Any, said: bytes) -> None:
    calls = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        calls.append(said)
        writer.write(said)
        writer.close()

    server, address = await listen(serve)
    listener = bench.listener()
    async with bench.client(address, listener) as client:
        await bench.until(lambda: len(calls) > 2)
        assert not client.up
    server.close()
    assert listener.calls == []


async def test_a_worker_that_accepts_and_says_nothing(bench: Any, caplog: Any) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server, address = await listen(serve)
    async with bench.client(address, bench.listener(), handshake_timeout_s=0.1):
        await bench.until(lambda: "no handshake in 0.1 s" in caplog.text)
    server.close()


async def test_cancelled_while_connecting(bench: Any) -> None:
    """192.0.2.1 answers nothing, on any network (RFC 5737)."""
    listener = bench.listener()
    client = client_of("192.0.2.1:9", listener)
    running = asyncio.ensure_future(client.run())
    await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.wait([running], timeout=WITHIN_S)
    assert running.done()
    assert listener.calls == []


async def test_a_file_that_comes_too_late(bench: Any) -> None:
    worker = bench.worker()
    async with (
        bench.server(worker) as server,
        bench.client(server.address, bench.listener(), asset_timeout_s=0.05) as client,
    ):
        await bench.until(lambda: client.up)
        (peer,) = server.peers
        peer._send_asset = lambda sha256: None
        with pytest.raises(RemoteError, match=r"not here in 0\.05 s"):
            await client.asset("00")
        assert client.up


async def test_nobody_knocks_at_the_door_of_a_worker_that_said_goodbye(bench: Any, caplog: Any) -> None:
    caplog.set_level("DEBUG", logger="penstock.link")
    listener = bench.listener()
    async with bench.server(bench.worker()) as server:
        client = LinkClient(
            server.address,
            listener,
            ClientSettings(retry_min_s=0.01, retry_max_s=0.02),
            frontend_id="f1",
            expected=Incarnation("w1", 1),
        )
        running = asyncio.ensure_future(client.run())
        await bench.until(lambda: client.up)
        await server.close("stopped")
        await asyncio.wait_for(running, WITHIN_S)
    assert client.reason == "the worker left: stopped"
    said = [record for record in caplog.records if record.name == "penstock.link.client"]
    assert [record.levelname for record in said] == ["DEBUG"]


async def test_a_worker_whose_engine_died_is_asked_again(bench: Any) -> None:
    listener = bench.listener()
    async with (
        bench.server(bench.worker()) as server,
        bench.client(server.address, listener, expected=Incarnation("w1", 1)) as client,
    ):
        await bench.until(lambda: client.up)
        await server.close("its engine died", failed=True)
        await bench.until(lambda: "cannot connect" in client.reason)


async def test_cancelling_one_who_waits_for_a_file_does_not_harm_another(bench: Any) -> None:
    content = bytes(3_000_000)
    name = hashlib.sha256(content).hexdigest()
    worker = bench.worker()
    worker.assets[name] = content
    async with bench.server(worker) as server, bench.client(server.address, bench.listener()) as client:
        await bench.until(lambda: client.up)
        first, second = asyncio.ensure_future(client.asset(name)), asyncio.ensure_future(client.asset(name))
        await asyncio.sleep(0)
        first.cancel()
        assert await second == content
        assert await client.asset(name) == content


@pytest.mark.parametrize("address", ["nohost", "a:b"])
def test_not_an_address(bench: Any, address: str) -> None:
    with pytest.raises(ConfigError, match="address"):
        client_of(address, bench.listener())
