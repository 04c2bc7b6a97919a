"""A small HTTP/1.1 client for measurements. It costs little CPU per chunk, and records when each chunk
arrived.

It is an asyncio.Protocol over httptools, without streams, futures or tasks per chunk: a client that needs
as much CPU as the server would measure itself. Answers are passed to a Receiver as they arrive.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

from penstock.errors import ConfigError, RemoteError
from penstock.net.address import unix_socket_path

CONNECT_TIMEOUT_S = 10.0
"""Timeout of connecting, TLS handshake included."""

MAX_IDLE_CONNECTIONS = 4096
"""Most idle connections that are kept for reuse. Further ones are closed after use."""


class RequestFailed(RemoteError):
    """A request got no complete answer. The report groups failures by `kind`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Receiver(Protocol):
    """Receives an answer as it arrives. Must not raise."""

    def on_status(self, status: int, retry_after_s: float = 0.0) -> None:
        """Called when the head of the answer has arrived. `retry_after_s` is 0 without a Retry-After in
        seconds."""

    def on_body(self, chunk: bytes, now: float) -> None:
        """Called with a part of the body. `now` is the time.perf_counter() at which it was read."""


class HttpClient:
    """A pool of keep-alive connections to one server.

    Args:
        base_url: `http://host:port` or `https://...`, optionally with a path that precedes all paths; or
            `unix:/path` of a Unix socket.
        headers: sent with every request.
    """

    def __init__(self, base_url: str, headers: dict[str, str] | None = None) -> None:
        self._socket_path = unix_socket_path(base_url)
        if self._socket_path:
            base_url = "http://localhost"
        url = urlsplit(base_url if "//" in base_url else f"http://{base_url}")
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ConfigError(f"url: `{base_url}` is no address: expected http://HOST:PORT or unix:/PATH")
        self._ssl = ssl.create_default_context() if url.scheme == "https" else None
        self._host = url.hostname
        self._port = url.port or (443 if self._ssl else 80)
        self._prefix = url.path.rstrip("/")
        lines = [f"Host: {url.netloc.rpartition('@')[2]}", "Content-Type: application/json"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        self._head = "\r\n".join(lines)
        self._idle: list[_HttpConnection] = []
        self._open: set[_HttpConnection] = set()

    async def request(self, method: str, path: str, body: bytes, receiver: Receiver) -> None:
        """Send one request and return when its answer is complete.

        Raises:
            RequestFailed: of kind `connect`, `disconnected` or `protocol`. There is no timeout here; a
                cancelled request closes its connection.
        """
        head = (
            f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._head}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        message = head.encode() + body
        connection = self._idle.pop() if self._idle else await self._connect()
        reused = connection.used
        try:
            await connection.exchange(message, receiver)
        except RequestFailed:
            if not reused or connection.answered:
                raise
            # The server closed the idle connection just before, and has not received the request.
            connection = await self._connect()
            await connection.exchange(message, receiver)
        if connection.reusable and len(self._idle) < MAX_IDLE_CONNECTIONS:
            self._idle.append(connection)
        else:
            connection.close()

    async def close(self) -> None:
        """Close every connection; requests in progress fail."""
        closing = list(self._open)
        for connection in closing:
            connection.close()
        for connection in closing:
            await connection.closed.wait()

    async def _connect(self) -> _HttpConnection:
        loop, make = asyncio.get_running_loop(), partial(_HttpConnection, self._forget)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                if self._socket_path:
                    _, connection = await loop.create_unix_connection(make, self._socket_path)
                else:
                    _, connection = await loop.create_connection(
                        make, self._host, self._port, ssl=self._ssl
                    )
        except TimeoutError:
            raise RequestFailed("connect", f"no connection within {CONNECT_TIMEOUT_S:g} s") from None
        except OSError as error:
            raise RequestFailed("connect", str(error)) from error
        self._open.add(connection)
        return connection

    def _forget(self, connection: _HttpConnection) -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)


class _HttpConnection(asyncio.Protocol):
    """One connection, with one exchange at a time."""

    def __init__(self, on_lost: Callable[[_HttpConnection], None]) -> None:
        self.used = False
        self.answered = False  # whether the head of the current answer has arrived
        self.reusable = False
        self.closed = asyncio.Event()
        self._on_lost = on_lost
        self._now = 0.0

    async def exchange(self, message: bytes, receiver: Receiver) -> None:
        self.used = True
        self.answered = self.reusable = False
        self._receiver = receiver
        self._retry_after_s = 0.0
        self._parser = httptools.HttpResponseParser(self)
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._transport.is_closing():
            raise RequestFailed("disconnected", "closed while idle")
        self._transport.write(message)
        try:
            await self._done
        except asyncio.CancelledError:
            self.close()
            raise

    def close(self) -> None:
        self._transport.abort()

    # --- asyncio ----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transport does not inherit from it

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        if not self.used or self._done.done():
            self.close()  # no request is waiting for these bytes
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail("protocol", f"not HTTP/1.1: {error}")
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.reusable = False
        self._on_lost(self)
        if self.used:
            self._fail("disconnected", str(error) if error else "the server closed the connection")
        self.closed.set()

    # --- httptools --------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after" and value.isdigit():
            self._retry_after_s = float(value)

    def on_headers_complete(self) -> None:
        self.answered = True
        self._receiver.on_status(self._parser.get_status_code(), self._retry_after_s)

    def on_body(self, body: bytes) -> None:
        self._receiver.on_body(body, self._now)

    def on_message_complete(self) -> None:
        self.reusable = self._parser.should_keep_alive()
        if not self._done.done():
            self._done.set_result(None)

    def _fail(self, kind: str, message: str) -> None:
        if not self._done.done():
            self._done.set_exception(RequestFailed(kind, message))
