"""A worker's HTTP port: /live until its engine is dead, /health while it takes work, and /metrics.

What `kubectl`, Prometheus and people ask a worker. It is a small ASGI application on uvicorn; the
frontend's server is not used, because nothing of OpenAI's API is served here.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from penstock.errors import ConfigError
from penstock.logs.quiet_log import QuietLog
from penstock.metrics import METRICS_CONTENT_TYPE
from penstock.net.address import join_address
from penstock.net.http_server import served
from penstock.net.listening import listen

log = logging.getLogger("penstock.probes")

DEFAULT_PORT = 9090
"""Dynamo's manifests ask there."""

MAX_CONNECTIONS = 64
"""Connections at once; a further one drops the oldest, so that silent ones keep no probe out: those are
answered at once."""

CONNECTION_S = 10.0
"""How long a connection may last, idle or not; a prober simply makes another."""

Health = Callable[[], dict[str, Any]]


class _App:
    """The ASGI application. `health` returns the body; its `status` decides between 200 and 503: /health
    is for `healthy` only, /live for anything but `dead`. `exposition` returns what /metrics shows."""

    def __init__(self, health: Health, exposition: Callable[[], bytes]) -> None:
        self._health = health
        self._exposition = exposition

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        status, body = 404, {"status": "not found"}
        if scope["path"] == "/live":
            dead = self._health()["status"] == "dead"
            status, body = (503, {"status": "dead"}) if dead else (200, {"status": "live"})
        elif scope["path"] == "/health":
            body = self._health()
            status = 200 if body["status"] == "healthy" else 503
        elif scope["path"] == "/metrics":
            return await _respond(send, 200, self._exposition(), METRICS_CONTENT_TYPE.encode())
        await _respond(send, status, msgspec.json.encode(body), b"application/json")


async def _respond(send: Any, status: int, body: bytes, content_type: bytes) -> None:
    headers = [(b"content-type", content_type)]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class _Connection(H11Protocol):
    """h11, unlike the faster parser, bounds all that is no body, trailers included; and no connection lasts
    long enough to keep others out."""

    quiet_log: QuietLog  # set by `probes`

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.logger = self.quiet_log
        self._end = self.loop.call_later(CONNECTION_S, transport.abort)
        if len(self.connections) > MAX_CONNECTIONS:
            others = cast(set[_Connection], self.connections)
            min(others, key=lambda other: other._end.when()).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end.cancel()
        super().connection_lost(exc)


@contextlib.asynccontextmanager
async def probes(
    host: str, port: int | None, health: Health, exposition: Callable[[], bytes]
) -> AsyncIterator[int]:
    """Serve probes meanwhile; the value is the port. Raises ConfigError when it cannot be had. None: the
    usual port, or another where that is taken."""
    protocol = type("_Connection", (_Connection,), {"quiet_log": QuietLog(log)})
    with _listen(host, port) as listener:
        async with served(_App(health, exposition), protocol, listener):
            log.info("probes on http://%s", join_address(*listener.getsockname()[:2]))
            yield listener.getsockname()[1]


def _listen(host: str, port: int | None) -> socket.socket:
    try:
        return listen(host, DEFAULT_PORT if port is None else port)
    except OSError as error:
        if port is None and error.errno == errno.EADDRINUSE:
            log.warning("port %d is taken, probes use another one; --system-port sets it", DEFAULT_PORT)
            return _listen(host, 0)
        where = join_address(host, DEFAULT_PORT if port is None else port)
        raise ConfigError(f"--system-port: cannot listen on {where}: {error.strerror}") from error
