"""A worker's HTTP port for probes: /live while the process turns, /health while it takes work.

What `kubectl` and people ask a worker. It is a small ASGI application on uvicorn; the frontend's server is
not used, because nothing of OpenAI's API is served here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import msgspec
import uvicorn

from penstock.errors import ConfigError

log = logging.getLogger("penstock.probes")

MAX_CONNECTIONS = 64
"""Probes at once; a further one is answered with 503. Probes are few, and answered at once."""

Health = Callable[[], dict[str, Any]]


class _App:
    """The ASGI application. `health` returns the body; its `status` decides between 200 and 503."""

    def __init__(self, health: Health) -> None:
        self._health = health

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        status, body = 404, {"status": "not found"}
        if scope["path"] == "/live":
            status, body = 200, {"status": "live"}
        elif scope["path"] == "/health":
            body = self._health()
            status = 200 if body["status"] == "healthy" else 503
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": msgspec.json.encode(body)})


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # signals are the process's own


@contextlib.asynccontextmanager
async def probes(host: str, port: int, health: Health) -> AsyncIterator[int]:
    """Serve probes meanwhile; the value is the port. Raises ConfigError when it cannot be had."""
    config = uvicorn.Config(
        _App(health),
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=1,
    )
    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        raise ConfigError(f"--system-port: cannot listen on {host}:{port}: {error.strerror}") from error
    with listener:
        server = _Server(config)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(server.serve([listener]), name="probes")
            log.info("probes on http://%s:%d", *listener.getsockname()[:2])
            try:
                yield listener.getsockname()[1]
            finally:
                server.should_exit = True
