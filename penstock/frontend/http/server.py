"""The HTTP server: uvicorn in the running loop.

Signals are the caller's: nothing here touches them.
"""

from __future__ import annotations

import asyncio
import logging
import math
import resource
import socket
import ssl
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import msgspec
import uvicorn

from penstock.errors import ConfigError
from penstock.frontend.app import App
from penstock.frontend.http.connection import MAX_LINGERING, HttpConnection, connection_class
from penstock.frontend.settings import FrontendSettings
from penstock.logs.quiet_log import QuietLog
from penstock.net.address import join_address
from penstock.net.http_server import HttpServer
from penstock.net.listening import BACKLOG, InheritedListener, UnixListener, listen
from penstock.net.renewed import Renewed
from penstock.net.tls_acceptor import TlsAcceptor

log = logging.getLogger("penstock.frontend")

OTHER_DESCRIPTORS: Final = 512  # that clients must leave, above all for links: one for each worker
CLOSE_GRACE_S: Final = 2  # for writing what is left after the last call has ended
POLL_S: Final = 0.05  # between looks at what tells nobody
TLS_CLOSE_S: Final = 5.0  # for a client to end TLS once its connection is closed here


async def serve(
    app: App,
    settings: FrontendSettings,
    *,
    stop: asyncio.Event,
    grace_s: float = 30.0,
    on_listening: Callable[[str, int], None] | None = None,
    inherited: InheritedListener | None = None,
) -> None:
    """Serve until `stop` is set, then let calls finish for at most `grace_s`, and return.

    `on_listening` is called with the host and port once connections are accepted. With an inherited
    listener that is once the app is healthy, or when the listener's patience is over. After `stop`, a
    server with an inherited listener accepts no more connections, and serves the requests that come on
    those it has. Cancelling this drops everything at once. Raises ConfigError when the address or the
    certificate cannot be used.
    """
    settings = msgspec.structs.replace(settings, max_connections=_connections(settings))
    server = _Server(_config(app, settings), settings)
    unix: UnixListener | None = None
    listeners = _listeners(settings, inherited)
    host, port = listeners[0].getsockname()[:2] if listeners else (settings.uds, -1)

    def started() -> None:
        scheme = "https" if settings.tls_cert else "http"
        if port != -1:
            log.info("listening on %s://%s", scheme, join_address(host, port))
        if unix is not None:
            log.info("listening on the Unix socket %s (%s)", settings.uds, scheme)
        if on_listening is not None:
            on_listening(host, port)

    server.on_started = started
    try:
        if settings.uds and inherited is None:
            unix = _listen_unix(settings.uds, take_over=False)
        async with asyncio.TaskGroup() as tasks:
            if inherited is not None:
                await _until(lambda: app.healthy or stop.is_set(), time.monotonic() + inherited.patience_s)
            if stop.is_set():
                return
            if settings.uds and unix is None:  # the process before this one had it until now
                unix = _listen_unix(settings.uds, take_over=True)
            tasks.create_task(server.serve([*listeners, *([unix.socket] if unix is not None else [])]))
            reporting = tasks.create_task(_report_once_healthy(app, server, inherited))
            await stop.wait()
            reporting.cancel()
            leaving_at = time.monotonic()
            if inherited is not None:
                await server.leave_port(grace_s)
            await app.drain(max(0.0, grace_s - (time.monotonic() - leaving_at)))
            server.should_exit = True
    finally:
        server.drop_all()
        for listener in listeners:
            listener.close()
        if unix is not None:
            unix.close()
        if inherited is not None:
            inherited.close()
        app.close()
        await server.end_handshakes()


async def _report_once_healthy(app: App, server: _Server, inherited: InheritedListener | None) -> None:
    if inherited is not None:
        await _until(lambda: server.started and app.healthy)
        inherited.report_ready()


async def _until(holds: Callable[[], bool], deadline: float = math.inf) -> None:
    """Look again and again; nobody tells. Until `deadline`, of the monotonic clock."""
    while not holds() and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(POLL_S)


def _connections(settings: FrontendSettings) -> int:
    """How many clients there may be, with as many file descriptors as this process may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = max(1, soft - OTHER_DESCRIPTORS - MAX_LINGERING)
    if soft == resource.RLIM_INFINITY or room >= settings.max_connections:
        return settings.max_connections
    log.warning("only %d connections are possible, as ulimit -n is %d", room, soft)
    return room


def _config(app: App, settings: FrontendSettings) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        http=connection_class(settings, app.refused),
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
    """With TLS of our own, a callback once it has started, and a way to leave its port."""

    on_started: Callable[[], None]

    def __init__(self, config: uvicorn.Config, settings: FrontendSettings) -> None:
        super().__init__(config)
        self._connection = cast(type[HttpConnection], config.http_protocol_class)
        self._tls: TlsAcceptor | None = None
        if settings.tls_cert:
            files = [Path(file) for file in (settings.tls_cert, settings.tls_key) if file]
            self._tls = TlsAcceptor(
                Renewed("HTTPS certificate", files, lambda: _tls_context(settings)).get,
                handshake_timeout_s=settings.tls_timeout_s,
                shutdown_timeout_s=TLS_CLOSE_S,
                room=lambda: min(
                    settings.max_tls_handshakes,
                    settings.max_connections + MAX_LINGERING - len(self.server_state.connections),
                ),
                log=QuietLog(log),
            )
            make = partial(_accept, self._tls, self._connection)
            config.http_protocol_class = cast(type[asyncio.Protocol], make)  # it is only called

    async def leave_port(self, grace_s: float) -> None:
        """Accept nothing more, and serve the connections there are until they have ended, for at most
        `grace_s`. They end with their next answer, or when no request comes for a while. Those that are not
        through with TLS are among them."""
        connections = cast(set[HttpConnection], self.server_state.connections)
        log.info("no longer accepting connections, open=%d", len(connections))
        deadline = time.monotonic() + grace_s
        await _until(lambda: self.started)
        for server in self.servers:
            server.close()
        self._connection.leaving = True
        for connection in list(connections):
            connection.leave()
        await asyncio.sleep(POLL_S)  # the last ones to be accepted get here
        await _until(lambda: not self._handshakes and not connections, deadline)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_started()

    @property
    def _handshakes(self) -> int:
        return self._tls.handshakes if self._tls is not None else 0

    async def end_handshakes(self) -> None:
        """Once nothing listens any more."""
        if self._tls is not None:
            await self._tls.close()


def _accept(acceptor: TlsAcceptor, connection: type[asyncio.Protocol], **given: Any) -> asyncio.Protocol:
    """In place of uvicorn's protocol class, which it calls for each connection that is accepted."""
    return acceptor.accept(partial(connection, **given))


def _listeners(settings: FrontendSettings, inherited: InheritedListener | None) -> list[socket.socket]:
    """Of the port; none where there is to be no port."""
    if inherited is not None:
        return [inherited.socket]
    return [] if settings.port == -1 else [_listen(settings.host, settings.port)]


def _listen_unix(path: str, *, take_over: bool) -> UnixListener:
    try:
        return UnixListener(path, BACKLOG, take_over=take_over)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot listen on the Unix socket {path}: {error}") from None


def _listen(host: str, port: int) -> socket.socket:
    try:
        return listen(host, port, BACKLOG)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {join_address(host, port)}: {error}") from None
