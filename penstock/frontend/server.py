"""The HTTP server: uvicorn in the running loop.

Signals are the caller's: nothing here touches them.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import ssl
from collections.abc import Callable
from typing import Final

import msgspec
import uvicorn

from penstock.errors import ConfigError
from penstock.frontend.app import App
from penstock.frontend.connection import connection_class
from penstock.frontend.settings import FrontendSettings
from penstock.http_server import HttpServer, listen
from penstock.link.tls import renewing

log = logging.getLogger("penstock.frontend")

BACKLOG: Final = 2048  # connections the kernel holds until they are accepted
OTHER_DESCRIPTORS: Final = 512  # that clients must leave, above all for links: one for each worker
CLOSE_GRACE_S: Final = 2  # for writing what is left after the last call has ended


async def serve(
    app: App,
    settings: FrontendSettings,
    *,
    stop: asyncio.Event,
    grace_s: float = 30.0,
    on_listening: Callable[[str, int], None] | None = None,
) -> None:
    """Serve until `stop` is set, then let calls finish for at most `grace_s`, and return.

    `on_listening` is called with the host and port once connections are accepted. Cancelling this drops
    everything at once. Raises ConfigError when the address or the certificate cannot be used.
    """
    settings = msgspec.structs.replace(settings, max_connections=_connections(settings))
    config = _config(app, settings)
    listener = _listen(settings.host, settings.port)
    port = listener.getsockname()[1]

    def started() -> None:
        scheme = "https" if settings.tls_cert else "http"
        log.info("listening on %s://%s:%d", scheme, settings.host, port)
        if on_listening is not None:
            on_listening(settings.host, port)

    server = _Server(config, started)
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(server.serve([listener]))
            await stop.wait()
            await app.drain(grace_s)
            server.should_exit = True
    finally:
        server.drop_all()
        listener.close()
        app.close()


def _connections(settings: FrontendSettings) -> int:
    """How many clients there may be, with as many file descriptors as this process can get."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return settings.max_connections
    wanted = settings.max_connections + OTHER_DESCRIPTORS
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft < wanted:
        log.warning("room for %d connections only: ulimit -n is %d", soft - OTHER_DESCRIPTORS, soft)
    return min(settings.max_connections, max(1, soft - OTHER_DESCRIPTORS))


def _config(app: App, settings: FrontendSettings) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        http=connection_class(settings),
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=max(1, round(settings.keep_alive_s)),
        timeout_graceful_shutdown=CLOSE_GRACE_S,
    )
    config.load()
    if settings.tls_cert:
        files = (settings.tls_cert, settings.tls_key)
        config.ssl = renewing("HTTPS certificate", files, lambda: _tls_context(settings))
    return config


def _tls_context(settings: FrontendSettings) -> ssl.SSLContext:
    """Python's defaults: TLS 1.2 or newer, with forward secrecy. (uvicorn's own allow less.)"""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.options |= ssl.OP_NO_RENEGOTIATION
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key or None, password=lambda: "")
    except OSError as error:
        raise ConfigError(f"HTTPS certificate {settings.tls_cert}: {error}") from None
    return context


class _Server(HttpServer):
    """With a word when it has started."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()


def _listen(host: str, port: int) -> socket.socket:
    try:
        return listen(host, port, BACKLOG)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error}") from None
