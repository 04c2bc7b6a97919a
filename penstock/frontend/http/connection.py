"""A client's connection: uvicorn's HTTP protocol with the limits that it leaves open.

uvicorn has deadlines for idle connections and none for slow ones. Here a request's head has a deadline
and a size, whatever else is no body has a size too, connections and pipelined requests have a limit, and
a closing connection whose client takes nothing is dropped.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any, Final, cast

import httptools
import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from penstock.errors import ProtocolError, Rejection, RequestRejected
from penstock.frontend.http.exchange import ABORT_EXTENSION, LENGTH_EXTENSION, WRITE_EXTENSION
from penstock.frontend.http.statuses import error_object, status_of
from penstock.frontend.settings import FrontendSettings
from penstock.logs.quiet_log import QuietLog
from penstock.net.address import join_address

log = logging.getLogger("penstock.frontend")

MAX_HEAD_BYTES: Final = 64 * 1024
"""Request line and headers; common servers allow 8 to 64 KiB. The same goes for all else that may come
without a byte of a body between it: blank lines, and after the last chunk of a body its trailers."""

MAX_PIPELINED: Final = 16
"""Requests that may wait on one connection for the response to the one before. Common clients send none."""

LEAVING_IDLE_S: Final = 1.0
"""How long a server that leaves its port keeps an idle connection open. The client may be about to send a
request, and many clients do not repeat one that they sent into a closing connection."""

LINGER_S: Final = 2.0  # after refusing a connection, for the client to read why and close

_METHOD: Final = re.compile(rb"[\r\n]*([!#-'*+.0-9A-Z^-z|~-]{1,32}) [^ \r\n]+ HTTP/")
_TLS: Final = b"\x16\x03"  # how a connection of TLS begins
_HTTP_2: Final = b"PRI * HTTP/2"  # and one of HTTP/2 that nobody has asked for

MAX_LINGERING: Final = 256
"""Connections beyond the limit that are kept for so long; any more are dropped at once."""


class HttpConnection(HttpToolsProtocol):
    """Adds: a deadline and a limit for the head, a way to abort, errors in OpenAI's shape, and ends
    that let the client read the answer.

    Closing a socket with unread bytes resets the connection, and the client may lose the response. So what
    is still coming after an early answer is read and thrown away, for a limited time.
    """

    settings: FrontendSettings  # set by connection_class, as are the next two
    quiet_log: QuietLog
    on_refused: Callable[[RequestRejected], None]
    leaving = False  # of all connections: each ends with its next answer

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.url = b""  # there may be errors before the first request
        self._refused = False
        self._in_request = False  # between the first byte of one and its last
        self._head_bytes = 0  # since the last byte of a body, or the last end of a request
        self._plain_head = b""  # of a request that asks for an upgrade, until it is parsed again without
        self._abort_timer: asyncio.TimerHandle | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._await_head()
        if self.leaving:
            self.leave()
        if len(self.connections) > self.settings.max_connections + MAX_LINGERING:
            self.transport.abort()
        elif len(self.connections) > self.settings.max_connections:
            self.quiet_log.warning("too many connections: %s is refused", self._client_address())
            error = RequestRejected(
                "Too many connections.", kind=Rejection.UNAVAILABLE, code="overloaded", retry_after_s=1.0
            )
            self._refuse(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_complete()
        self._unset_abort()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._head_bytes += len(data)
        self._unset_keepalive_if_required()
        if self._head_timer is None and not self._in_request and self.cycle.response_complete:
            self._await_head()  # it was idle; what comes may be no request yet
        self._feed(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse_head()

    def _feed(self, data: bytes) -> None:
        while data:
            try:
                try:
                    self.parser.feed_data(data)
                    return
                except httptools.HttpParserUpgrade as upgrade:
                    data = self._plain_head + data[upgrade.args[0] :]
                    self.parser = httptools.HttpRequestParser(self)
            except httptools.HttpParserError as error:
                if self._head_bytes > MAX_HEAD_BYTES:  # it gives up on long URLs by itself
                    self._refuse_head()
                    return
                self.quiet_log.info("%s sent invalid HTTP: %s", self._client_address(), error)
                self._refuse(_refusal(error, data))
                return

    def _client_address(self) -> str:
        return join_address(*self.client) if self.client else "a client"

    def on_message_begin(self) -> None:
        if len(self.pipeline) == MAX_PIPELINED:
            self.transport.abort()
            raise ProtocolError(f"more than {MAX_PIPELINED} requests without waiting for responses")
        super().on_message_begin()
        self._in_request = True
        self._unset_keepalive_if_required()  # since the end of the one before, in the same bytes
        extensions = {ABORT_EXTENSION: self.transport.abort, WRITE_EXTENSION: self._write_chunk}
        cast(dict[str, Any], self.scope)["extensions"] = extensions
        if self._head_timer is None:
            self._await_head()

    def on_headers_complete(self) -> None:
        # Java's client, and others, ask for HTTP/2 with each connection's first request. They accept an
        # answer in HTTP/1.1, but the parser ends such a request after its head and leaves its body unread.
        # So that head is not used, and a new parser gets the same one without `Upgrade`.
        self._plain_head = b""
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            self._plain_head = self._head_without(b"upgrade")
            return
        if self._head_bytes > MAX_HEAD_BYTES and self._parsed_head_bytes() > MAX_HEAD_BYTES:
            raise ProtocolError("too large a head")  # in one piece, with its end
        if not self.url.startswith(b"/") and httptools.parse_url(self.url).path is None:
            origin, mark, query = self.url.partition(b"?")  # as in `GET http://host?a=b`
            self.url = b"%b/%b%b" % (origin, mark, query)
        if self.parser.get_http_version() == "1.0":
            self.expect_100_continue = False  # its clients do not know the answer to it
        self._head_complete()
        super().on_headers_complete()
        if (
            self.parser.get_http_version() == "1.0"
        ):  # which knows no chunks: a stream ends with its connection
            plain = {WRITE_EXTENSION: self._write_plain, LENGTH_EXTENSION: partial(_set_length, self.cycle)}
            cast(dict[str, Any], self.scope)["extensions"].update(plain)
        if self.leaving:
            self.cycle.keep_alive = False

    def _parsed_head_bytes(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + len(": \r\n") for name, value in self.headers)

    def _head_without(self, name: bytes) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != name]
        return b"\r\n".join((*lines, b"", b""))

    def leave(self) -> None:
        """End after the next answer that can say so, or when no request comes for a while. An answer under
        way has promised to keep the connection, so that its client may already use it again."""
        self.timeout_keep_alive = LEAVING_IDLE_S  # type: ignore[assignment]
        if self.cycle is not None and not self.cycle.response_complete:
            if not self.cycle.response_started:
                self.cycle.keep_alive = False
        elif not self._in_request:
            self._await_request()

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._plain_head:
            return
        self._in_request = False
        self._head_bytes = 0
        self._unset_abort()
        super().on_message_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            self._await_request()  # its answer did not wait for its body

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._abort_after(self.settings.client_stall_s)
        elif self.cycle.more_body:
            self._abort_after(self.settings.body_timeout_s)

    def timeout_keep_alive_handler(self) -> None:
        # A plain close would wait, without end, for a client that does not take its response.
        self.transport.abort()

    def _write_chunk(self, body: bytes) -> bool:
        """What uvicorn's `send` does for a part of a body without a length, at a fraction of its cost."""
        if self.flow.write_paused or self.transport.is_closing():
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
        return True

    def _write_plain(self, body: bytes) -> bool:
        """The same for a client of HTTP/1.0."""
        if self.flow.write_paused or self.transport.is_closing():
            return False
        self.transport.write(body)
        return True

    def _refuse(self, error: RequestRejected) -> None:
        """Answer what is not even a request, and end the connection."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self.on_refused(error)
        body = msgspec.json.encode(error_object(error))
        status = HTTPStatus(status_of(error))
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        if self.transport.can_write_eof():  # TLS cannot
            self.transport.write_eof()
        self._abort_after(LINGER_S)

    def _refuse_head(self) -> None:
        if len(self.url) > MAX_HEAD_BYTES // 2:
            error = RequestRejected("The URL is too long.", kind=Rejection.URL_TOO_LONG)
        else:
            message = f"More than {MAX_HEAD_BYTES} bytes of request line and headers, or of trailers."
            error = RequestRejected(message, kind=Rejection.HEAD_TOO_LARGE)
        self._refuse(error)

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.settings.header_timeout_s, self.transport.abort)

    def _await_request(self) -> None:
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def _head_complete(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _abort_after(self, seconds: float) -> None:
        self._unset_abort()
        self._abort_timer = self.loop.call_later(seconds, self.transport.abort)

    def _unset_abort(self) -> None:
        if self._abort_timer is not None:
            self._abort_timer.cancel()
            self._abort_timer = None


def _refusal(error: httptools.HttpParserError, data: bytes) -> RequestRejected:
    """What to say of bytes that the parser cannot read."""
    reason = str(error)
    if isinstance(error, httptools.HttpParserInvalidMethodError):
        method = _METHOD.match(data)
        if method is not None:
            message = (
                f"The HTTP method `{method[1].decode()}` is not known; methods are written in capitals."
            )
            return RequestRejected(message, kind=Rejection.NOT_IMPLEMENTED, code="unknown_method")
        reason = (
            "this is TLS, but this port serves http://" if data.startswith(_TLS) else "it has no method"
        )
    elif isinstance(error, httptools.HttpParserCallbackError):
        reason = "its target is no path, and no URL with one"
    elif reason == "Invalid HTTP version" or data.startswith(_HTTP_2):
        message = "This version of HTTP is not supported; use HTTP/1.1."
        return RequestRejected(message, kind=Rejection.UNSUPPORTED_VERSION)
    return RequestRejected(f"Invalid HTTP request: {reason}.", code="invalid_http")


def _set_length(cycle: RequestResponseCycle, length: int) -> None:
    """So much of a response's body is to come, and it is not cut into chunks."""
    cycle.chunked_encoding = False
    cycle.expected_content_length = length


def connection_class(
    settings: FrontendSettings, on_refused: Callable[[RequestRejected], None]
) -> type[asyncio.Protocol]:
    """The protocol class for uvicorn, which makes the instances itself. `on_refused` is told of what was
    answered before it was a request."""
    given = {"settings": settings, "quiet_log": QuietLog(log), "on_refused": staticmethod(on_refused)}
    return type("Connection", (HttpConnection,), given)
