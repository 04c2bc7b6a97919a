"""The server against peers that are not ours: garbage, silence, half-open connections."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
from typing import Any

import pytest

from penstock.clock import VirtualClock
from penstock.errors import ConfigError
from penstock.link.secret import LinkSecret
from penstock.link.server import LinkServer
from penstock.link.settings import ServerSettings, TlsSettings
from penstock.wire.frames import FrameDecoder, decode_to_frontend, encode
from penstock.wire.handshake import FrontendHandshake
from penstock.wire.messages import Challenge, Generate, Goodbye, Hello, Ping
from tests.waiting import WITHIN_S


class Stranger:
    """A plain socket to a server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.decoder = FrameDecoder()
        self.messages: list[Any] = []

    @classmethod
    async def connect(cls, address: str) -> Stranger:
        host, port = address.split(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    async def read(self) -> Any:
        while not self.messages:
            received = await asyncio.wait_for(self.reader.read(65536), WITHIN_S)
            assert received, "hung up"
            self.messages += map(decode_to_frontend, self.decoder.feed(received))
        return self.messages.pop(0)

    async def hello(self, frontend_id: str = "f1") -> Hello:
        challenge = await self.read()
        assert isinstance(challenge, Challenge)
        return FrontendHandshake("", os.urandom(16), frontend_id).answer(challenge)

    async def hung_up(self) -> None:
        """Wait until the server has ended it."""
        try:
            while await asyncio.wait_for(self.reader.read(65536), WITHIN_S):
                pass
        except ConnectionError:
            pass

    async def close(self) -> None:
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except ConnectionError:
            pass


async def assert_serves(bench: Any, server: Any) -> None:
    async with bench.client(server.address, bench.listener(), "well-behaved") as client:
        await bench.until(lambda: client.up)


@pytest.mark.parametrize(
    "received",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x00\x00\x00\x00",
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x05hello",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        encode(Ping()),
        encode(Generate(seq=1, attempt=None))[:-1] + b"\xc0",  # type: ignore[arg-type]
    ],
)
async def test_garbage_costs_one_line_and_nothing_else(bench: Any, caplog: Any, received: bytes) -> None:
    worker = bench.worker()
    async with bench.server(worker) as server:
        stranger = await Stranger.connect(server.address)
        stranger.writer.write(received)
        await stranger.hung_up()
        await stranger.close()
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert "was not established" in caplog.text
        await assert_serves(bench, server)
    assert worker.generated == []


async def test_noise_from_many(bench: Any, caplog: Any) -> None:
    rng = random.Random(7)
    async with bench.server(bench.worker(), handshake_timeout_s=0.2) as server:
        for _ in range(30):
            stranger = await Stranger.connect(server.address)
            stranger.writer.write(rng.randbytes(rng.randrange(1, 2000)))
            await stranger.close()
        await assert_serves(bench, server)
        await bench.until(lambda: not server.statistics().handshakes)
    assert len([record for record in caplog.records if "was not established" in record.message]) <= 10


async def test_garbage_after_the_welcome(bench: Any) -> None:
    worker = bench.worker()
    async with bench.server(worker) as server:
        stranger = await Stranger.connect(server.address)
        stranger.writer.write(encode(await stranger.hello()))
        await bench.until(lambda: server.peers)
        stranger.writer.write(b"\xff" * 10)
        await stranger.hung_up()
        await stranger.close()
        await bench.until(lambda: len(worker.lost) == 1)


async def test_hung_up_within_a_frame(bench: Any) -> None:
    worker = bench.worker()
    async with bench.server(worker) as server:
        stranger = await Stranger.connect(server.address)
        stranger.writer.write(encode(await stranger.hello()))
        await bench.until(lambda: server.peers)
        stranger.writer.write(encode(Generate(seq=1, attempt=bench.attempt()))[:-1])
        await stranger.close()
        await bench.until(lambda: worker.lost)
        assert worker.generated == []


async def test_half_closed_counts_as_gone(bench: Any) -> None:
    worker = bench.worker()
    async with bench.server(worker) as server:
        stranger = await Stranger.connect(server.address)
        stranger.writer.write(encode(await stranger.hello()))
        await bench.until(lambda: server.peers)
        stranger.writer.write_eof()
        await bench.until(lambda: worker.lost)
        await stranger.close()


async def test_a_peer_without_pings_is_dropped(bench: Any) -> None:
    """Half-open: the other machine lost its power, and no packet will ever say so."""
    worker = bench.worker()
    async with bench.server(worker, peer_timeout_s=0.2) as server:
        stranger = await Stranger.connect(server.address)
        stranger.writer.write(encode(await stranger.hello()))
        await bench.until(lambda: server.peers)
        await bench.until(lambda: worker.lost)
        await stranger.close()


async def test_silent_strangers_do_not_keep_others_out(bench: Any) -> None:
    async with bench.server(bench.worker(), max_handshakes=4) as server:
        silent = [await Stranger.connect(server.address) for _ in range(20)]
        await assert_serves(bench, server)
        await bench.until(lambda: server.statistics().handshakes <= 4)
        await silent[0].hung_up()
        for stranger in silent:
            await stranger.close()


async def test_silent_strangers_are_dropped_in_time(bench: Any, caplog: Any) -> None:
    async with bench.server(bench.worker(), handshake_timeout_s=0.1) as server:
        stranger = await Stranger.connect(server.address)
        stranger.writer.write(b"\x00")
        await stranger.hung_up()
        await stranger.close()
    assert "no Hello in 0.1 s" in caplog.text


async def test_close_says_goodbye_and_ends_everything(bench: Any) -> None:
    worker = bench.worker()
    async with bench.server(worker) as server:
        peer, stranger = [await Stranger.connect(server.address) for _ in range(2)]
        peer.writer.write(encode(await peer.hello()))
        await peer.read()
        await peer.read()
        await server.close("upgrade")
        assert len(worker.lost) == 1
        message = await peer.read()
        while not isinstance(message, Goodbye):  # heartbeats may come before it
            message = await peer.read()
        assert message.reason == "upgrade"
        await peer.hung_up()
        await stranger.hung_up()
        with pytest.raises(OSError):  # noqa: PT011
            await Stranger.connect(server.address)
        await peer.close()
        await stranger.close()


async def test_close_does_not_wait_for_one_that_does_not_read(bench: Any) -> None:
    worker = bench.worker()
    worker.assets["0"] = bytes(30_000_000)
    async with bench.server(worker, close_timeout_s=0.1) as server:
        host, port = server.address.split(":")
        with socket.create_connection((host, int(port))) as deaf:
            deaf.setblocking(False)
            await bench.until(lambda: server.statistics().handshakes)
            (peer,) = server._door._strangers
            peer.connection.write(bytes(20_000_000))
            started = asyncio.get_running_loop().time()
            await server.close("now")
            assert asyncio.get_running_loop().time() - started < WITHIN_S
        assert peer.connection.ended.done()


async def test_an_address_that_cannot_be_had(bench: Any) -> None:
    async with bench.server(bench.worker()) as server:
        for host, port in (("127.0.0.1", server.port), ("192.0.2.1", 0), ("a..b", 0)):
            with pytest.raises(ConfigError, match="cannot listen"):
                await LinkServer(ServerSettings(host=host, port=port), bench.worker()).start()


async def test_an_open_link_beyond_loopback_is_warned_of(
    bench: Any, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.link.server.is_loopback", lambda host: False)
    for secret, warned in ((LinkSecret("s" * 16), False), (LinkSecret(), True)):
        async with bench.server(bench.worker(), secret=secret):
            assert ("without a secret" in caplog.text) == warned


async def test_heartbeats_on_a_virtual_clock(bench: Any) -> None:
    clock = VirtualClock()
    worker = bench.worker()
    server = LinkServer(ServerSettings(), worker, clock)
    await server.start()
    running = asyncio.ensure_future(server.run())
    stranger = await Stranger.connect(server.address)
    stranger.writer.write(encode(await stranger.hello()))
    await stranger.read()
    await stranger.read()
    await clock.advance(5)
    for _ in range(5):
        assert (await stranger.read()).seen == 0
    await clock.advance(6)
    await bench.until(lambda: worker.lost)
    running.cancel()
    await asyncio.wait([running])
    await server.close("done")
    await stranger.close()


def test_tls_files_are_checked_first(bench: Any) -> None:
    with pytest.raises(ConfigError, match=r"tls\.cert_file"):
        LinkServer(ServerSettings(tls=TlsSettings()), bench.worker())


async def test_a_card_that_no_frontend_could_read_refuses_to_start(bench: Any) -> None:
    server = LinkServer(ServerSettings(max_frame_bytes=100), bench.worker())
    with pytest.raises(ConfigError, match="shorten --served-model-name or --instance-id"):
        await server.start()
