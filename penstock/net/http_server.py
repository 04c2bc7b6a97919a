"""uvicorn within a process of ours: what the frontend, the workers' probes and the operator have in
common."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn


class HttpServer(uvicorn.Server):
    """uvicorn, without its signal handlers: signals are the process's own."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.servers: list[asyncio.base_events.Server] = []

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def drop_all(self) -> None:
        """Close what a cancelled `serve` left open: uvloop never ends with a listener that it does not know
        to be closed."""
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.transport.abort()


@contextlib.asynccontextmanager
async def served(
    app: Any,
    protocol: type[asyncio.Protocol],
    listener: socket.socket,
    *,
    tls: ssl.SSLContext | None = None,
    connections_max: int | None = None,
) -> AsyncIterator[None]:
    """Serve an ASGI application that needs no more than that, meanwhile.

    Args:
        tls: serve HTTPS with what this context holds; it may be loaded with another certificate meanwhile.
        connections_max: further ones get a 503.
    """
    config = uvicorn.Config(
        app,
        http=protocol,
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=connections_max,
        timeout_graceful_shutdown=1,
    )
    config.load()
    config.ssl = tls
    server = HttpServer(config)
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(server.serve([listener]), name="HTTP server")
            try:
                yield
            finally:
                server.should_exit = True
    finally:
        server.drop_all()
