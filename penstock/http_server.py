"""uvicorn within a process of ours: what the frontend's server and the workers' probes have in common."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

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


def listen(host: str, port: int, backlog: int | None = None) -> socket.socket:
    """A listening TCP socket; `::` takes IPv4 as well. Raises OSError, or OverflowError for no port."""
    ipv6 = ":" in host
    return socket.create_server(
        (host, port),
        family=socket.AF_INET6 if ipv6 else socket.AF_INET,
        backlog=backlog,
        dualstack_ipv6=ipv6 and host == "::" and socket.has_dualstack_ipv6(),
    )
