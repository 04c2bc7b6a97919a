from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from typing import Any

import httpx
import pytest

from penstock.errors import ConfigError
from penstock.logs.quiet_log import BURST_LINES
from penstock.worker.probes import probes
from tests.ports import free_port
from tests.waiting import WITHIN_S


async def test_health_follows_the_worker() -> None:
    body: dict[str, Any] = {"status": "starting"}
    async with probes("127.0.0.1", 0, lambda: body, bytes) as port, httpx.AsyncClient() as client:
        url = f"http://127.0.0.1:{port}"
        assert (await client.get(f"{url}/live")).status_code == 200
        assert (await client.get(f"{url}/health")).status_code == 503
        body["status"] = "healthy"
        answer = await client.get(f"{url}/health")
        assert answer.status_code == 200
        assert json.loads(answer.text) == body
        assert (await client.get(f"{url}/other")).status_code == 404
        for status, live in (("stuck", 200), ("draining", 200), ("dead", 503)):
            body["status"] = status
            assert (await client.get(f"{url}/health")).status_code == 503
            assert (await client.get(f"{url}/live")).status_code == live
    with pytest.raises(OSError, match="refused"), socket.create_connection(("127.0.0.1", port)):
        pass


async def test_metrics_are_shown_as_they_are_made() -> None:
    async with (
        probes("127.0.0.1", 0, lambda: {"status": "starting"}, lambda: b"x 1\n") as port,
        httpx.AsyncClient() as client,
    ):
        answer = await client.get(f"http://127.0.0.1:{port}/metrics")
    assert (answer.status_code, answer.text) == (200, "x 1\n")
    assert answer.headers["content-type"].startswith("text/plain; version=")


@pytest.mark.parametrize("hosts", [b"", b"host: a\r\nhost: b\r\n"])
async def test_a_probe_names_one_host(hosts: bytes) -> None:
    async with probes("127.0.0.1", 0, lambda: {"status": "healthy"}, bytes) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /live HTTP/1.1\r\n" + hosts + b"\r\n")
        assert (await asyncio.wait_for(reader.read(100), WITHIN_S)).startswith(b"HTTP/1.1 400 ")
        writer.close()


async def test_what_is_no_probe_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trailers without end, and connections that only wait."""
    monkeypatch.setattr("penstock.worker.probes.CONNECTION_S", 1.0)
    async with probes("127.0.0.1", 0, lambda: {"status": "healthy"}, bytes) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /live HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n")
        sent = 0
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(WITHIN_S):
                while not reader.at_eof() and sent < 10_000_000:
                    writer.write(b"a: b\r\n" * 1000)
                    sent += 6000
                    await writer.drain()
                    await asyncio.sleep(0)
        writer.close()
        assert sent < 10_000_000
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(WITHIN_S):
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
        writer.close()
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"http://127.0.0.1:{port}/live")).status_code == 200


async def test_strangers_keep_no_probe_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("penstock.worker.probes.MAX_CONNECTIONS", 3)
    async with probes("127.0.0.1", 0, lambda: {"status": "healthy"}, bytes) as port:
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
        async with asyncio.timeout(WITHIN_S):
            for reader, _ in silent[:17]:
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"http://127.0.0.1:{port}/live")).status_code == 200
        for _, writer in silent:
            writer.write(b"nonsense\r\n\r\n")
            writer.close()
        for _ in range(20):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"nonsense\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
            writer.close()
    assert caplog.text.count("Invalid HTTP request received.") == BURST_LINES


async def test_a_taken_port_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--system-port: cannot listen on 127.0.0.1:{port}"):
            async with probes("127.0.0.1", port, dict, bytes):
                pass


async def test_where_no_port_was_asked_for_a_taken_one_is_gone_around(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as taken:  # nobody else gets it afterwards
        usual = taken.getsockname()[1]
        monkeypatch.setattr("penstock.worker.probes.DEFAULT_PORT", usual)
        async with probes("127.0.0.1", None, lambda: {"status": "healthy"}, bytes) as port:
            assert port not in (0, usual)
            assert f"port {usual} is taken" in caplog.text
    async with probes("127.0.0.1", None, lambda: {"status": "healthy"}, bytes) as port:
        assert port == usual
