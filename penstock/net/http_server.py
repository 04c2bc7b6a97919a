"""The uvicorn server that the frontend, the probes of workers and the operator run in their processes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: the process handles signals itself."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.servers: list[asyncio.base_events.Server] = []

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def drop_all(self) -> None:
        """Close the listeners and connections that a cancelled `serve` left open. With an open listener,
        uvloop's event loop would not end."""
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
    """Serve a simple ASGI application while the block runs.

    Args:
        tls: serve HTTPS with the certificate in this context, which may be replaced while serving.
        connections_max: the most connections; further ones get status 503.
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
