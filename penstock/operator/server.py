"""The operator's HTTP server: /live, /health and /metrics, and over HTTPS the conversion webhook."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from penstock.errors import ConfigError
from penstock.logs.quiet_log import QuietLog
from penstock.net import http_server
from penstock.net.address import join_address
from penstock.net.listening import listen

log = logging.getLogger(__name__)

BODY_BYTES_MAX = 32 * 1024 * 1024
"""Largest body of a request. A ConversionReview holds all objects of a list, of up to 1.5 MB each."""

CONNECTIONS_MAX = 64


class HttpAnswer(msgspec.Struct, frozen=True):
    """The answer to an HTTP request."""

    status: int
    body: bytes
    content_type: str = "application/json"


Handler = Callable[[bytes], Awaitable[HttpAnswer]]
"""Answers a request, given its body."""


def as_json(status: int, body: Any) -> HttpAnswer:
    return HttpAnswer(status, msgspec.json.encode(body))


class _RoutedApp:
    """The ASGI application: a handler for each method and path."""

    def __init__(self, routes: Mapping[tuple[str, str], Handler]) -> None:
        self._routes = routes

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        handler = self._routes.get((scope["method"], scope["path"]))
        if handler is None:
            answer = as_json(404, {"status": "not found"})
        elif (body := await _body(receive)) is None:
            answer = as_json(413, {"status": f"more than {BODY_BYTES_MAX} bytes"})
        else:
            answer = await handler(body)
        headers = [(b"content-type", answer.content_type.encode())]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": answer.body})


async def _body(receive: Any) -> bytes | None:
    """The request's body; None if it is too long."""
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        part = message.get("body", b"")
        size += len(part)
        if size > BODY_BYTES_MAX:
            return None
        parts.append(part)
        more = message.get("more_body", False)
    return b"".join(parts)


class _Protocol(H11Protocol):
    """uvicorn's protocol, with a log that strangers cannot fill."""

    quiet_log: QuietLog

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.logger = self.quiet_log


@contextlib.asynccontextmanager
async def served(
    flag: str,
    host: str,
    port: int,
    routes: Mapping[tuple[str, str], Handler],
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[int]:
    """Serve while the block runs. Yields the port.

    Args:
        flag: the flag that set the port, for error messages.
        tls: serve HTTPS with the certificate in this context, which may be replaced while serving.

    Raises:
        ConfigError: the port is not available.
    """
    try:
        listener = listen(host, port)
    except OSError as error:
        raise ConfigError(
            f"{flag}: cannot listen on {join_address(host, port)}: {error.strerror}"
        ) from error
    protocol = type("_Protocol", (_Protocol,), {"quiet_log": QuietLog(log)})
    with listener:
        async with http_server.served(
            _RoutedApp(routes), protocol, listener, tls=tls, connections_max=CONNECTIONS_MAX
        ):
            scheme = "http" if tls is None else "https"
            log.info("listening on %s://%s", scheme, join_address(*listener.getsockname()[:2]))
            yield listener.getsockname()[1]
