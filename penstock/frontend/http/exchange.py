"""One HTTP request and its response, over ASGI: bodies within limits, writes that cannot hang.

Raw ASGI instead of a framework's response classes, because a streamed token should cost one write.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import time
from collections.abc import Callable, Sequence

import msgspec
from starlette.types import Receive, Scope, Send

from penstock.errors import PenstockError, Rejection, RequestRejected
from penstock.frontend.http.cors import Header, allows, answer_headers, preflight_headers
from penstock.frontend.http.statuses import REQUEST_ID, ErrorObject, code_of, error_object, status_of
from penstock.frontend.settings import FrontendSettings
from penstock.shapes import TraceContext

ABORT_EXTENSION = "penstock.abort"
"""ASGI extension (http/connection.py): a function that drops the connection with all it has unsent."""

WRITE_EXTENSION = "penstock.write"
"""ASGI extension (http/connection.py): a function that writes a part of a streamed body at once, or
returns False when the client is behind."""

LENGTH_EXTENSION = "penstock.length"
"""ASGI extension (http/connection.py) of requests in HTTP/1.0: a function that says how much of a body is
to come, which is then not cut into chunks."""

JSON = b"application/json"
EVENT_STREAM = b"text/event-stream; charset=utf-8"
KEEP_ALIVE = b": keep-alive\n\n"  # a comment in an event stream, which clients ignore
ID_BYTES = 16  # random ones, of the names that exchanges and calls get here
UNSUPPORTED_ENCODING = "unsupported_content_encoding"

_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_TRACESTATE = re.compile(rb"[ -~]{1,512}")
_REQUEST_ID = re.compile(rb"[!-~]{1,128}")
_JSON_TYPE = re.compile(rb"application/(?:[a-z0-9!#$&^_.+-]+\+)?json", re.IGNORECASE)
_HOST = re.compile(rb"(?:\[[0-9a-z:.%_~-]+\]|[a-z0-9._~!$&'()*+,;=%-]*)(?::[0-9]*)?", re.IGNORECASE)
_SHOWN_CHARS = 100  # of a header's value in an error


class Bodies:
    """What request bodies hold, all together: those that are being read, and those of calls under way,
    which are kept to the end of their call.

    Args:
        max_reading_bytes: of bodies being read.
        max_bytes: of all.
    """

    def __init__(self, max_reading_bytes: int, max_bytes: int) -> None:
        self._max_reading_bytes = max_reading_bytes
        self._max_bytes = max_bytes
        self._reading_bytes = 0
        self._bytes = 0

    def arrived(self, size: int) -> None:
        """Count bytes. Raises RequestRejected(OVERLOADED) when they are too many."""
        self._reading_bytes += size
        self._bytes += size
        if self._reading_bytes > self._max_reading_bytes:
            raise self._too_many("being read", self._max_reading_bytes)
        if self._bytes > self._max_bytes:
            raise self._too_many("of calls under way", self._max_bytes)

    def read(self, size: int) -> None:
        """A body of so many bytes is being read no longer."""
        self._reading_bytes -= size

    def dropped(self, size: int) -> None:
        """Bytes that arrived are kept no longer."""
        self._bytes -= size

    def _too_many(self, which: str, limit: int) -> RequestRejected:
        message = f"Too many request bodies at a time: those {which} have more than {limit} bytes together."
        return RequestRejected(message, kind=Rejection.OVERLOADED, retry_after_s=1.0)


class HttpExchange:
    """The two sides of one HTTP exchange."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, settings: FrontendSettings, bodies: Bodies
    ) -> None:
        self.status: int | None = None  # as sent; None as long as the response has not begun
        self.error_object: ErrorObject = error_object  # the endpoint may set its own
        self.more_headers: Callable[[], Sequence[Header]] | None = None  # asked when the response begins
        self.accounted = False  # whether it has its line in the log and its place in the metrics
        self._writing_since: float | None = None
        self._scope = scope
        self._headers: dict[bytes, bytes] = dict(reversed(scope["headers"]))  # the first of each name
        self._receive = receive
        self._send = send
        self._settings = settings
        self._bodies = bodies
        self._body_bytes = 0  # that arrived
        self._write_now: Callable[[bytes], bool] | None = scope.get("extensions", {}).get(WRITE_EXTENSION)
        self._set_length: Callable[[int], None] | None = None  # of a stream in HTTP/1.0
        self._stall_timer: asyncio.TimerHandle | None = None
        self._silence_timer: asyncio.TimerHandle | None = None
        self._silent = False  # since the last look at it
        given = self.header(b"x-request-id") or b""
        self.request_id = given if _REQUEST_ID.fullmatch(given) else os.urandom(ID_BYTES).hex().encode()

    def header(self, name: bytes) -> bytes | None:
        """The first header of this (lower-case) name."""
        return self._headers.get(name)

    def trace_context(self) -> TraceContext | None:
        """The trace that this is a part of, as the client says; None where that cannot be read."""
        given = self.header(b"traceparent") or b""
        if not _TRACEPARENT.fullmatch(given):
            return None
        state = self.header(b"tracestate") or b""
        return TraceContext(given.decode(), state.decode() if _TRACESTATE.fullmatch(state) else "")

    def check_head(self) -> None:
        """Raises RequestRejected for what no path serves: another version of HTTP, a body that is encoded
        for its transfer, something else to expect than an invitation to send the body."""
        self._check_host()
        version = self._scope["http_version"]
        if version not in ("1.1", "1.0"):
            message = f"HTTP/{version} is not supported; use HTTP/1.1."
            raise RequestRejected(message, kind=Rejection.UNSUPPORTED_VERSION)
        if b"transfer-encoding" in self._headers:
            self._check_coding()
        expected = self.header(b"expect")
        if expected is not None and expected.strip().lower() != b"100-continue" and version != "1.0":
            message = f"The expectation `{_shown(expected)}` cannot be met; only `100-continue` can."
            raise RequestRejected(message, kind=Rejection.UNMET_EXPECTATION)

    def _check_coding(self) -> None:
        codings = [value for key, value in self._scope["headers"] if key == b"transfer-encoding"]
        if len(codings) > 1 or codings[0].strip().lower() != b"chunked":
            message = (
                f"The Transfer-Encoding `{_shown(b', '.join(codings))}` is not supported; use `chunked`."
            )
            raise RequestRejected(message, kind=Rejection.NOT_IMPLEMENTED, code=UNSUPPORTED_ENCODING)

    def _check_host(self) -> None:
        """RFC 9112, 3.2 has a server refuse this: proxies differ in which of two hosts counts, and so in
        whom they let through to here."""
        hosts = [value for key, value in self._scope["headers"] if key == b"host"]
        if len(hosts) == 1 and _HOST.fullmatch(hosts[0]):
            return
        if not hosts:
            if self._scope["http_version"] == "1.0":
                return
            reason = "a request of HTTP/1.1 needs a Host header"
        elif len(hosts) > 1:
            reason = f"the request has {len(hosts)} Host headers"
        else:
            reason = f"`{_shown(hosts[0])}` is no host"
        raise RequestRejected(f"Invalid HTTP request: {reason}.", code="invalid_http")

    def _check_content(self) -> None:
        # A page of any web site may send forms and plain text here without asking, but no JSON.
        given = self.header(b"content-type")
        if given is None or not _JSON_TYPE.fullmatch(given.partition(b";")[0].strip()):
            was = "has no Content-Type" if given is None else f"has the Content-Type `{_shown(given)}`"
            message = f"The request {was}; send JSON with the header `Content-Type: application/json`."
            raise RequestRejected(
                message, kind=Rejection.UNSUPPORTED_CONTENT, code="unsupported_content_type"
            )
        encoding = self.header(b"content-encoding")
        if encoding is not None and encoding.strip().lower() not in (b"", b"identity"):
            message = (
                f"The Content-Encoding `{_shown(encoding)}` is not supported; send the body uncompressed."
            )
            raise RequestRejected(message, kind=Rejection.UNSUPPORTED_CONTENT, code=UNSUPPORTED_ENCODING)

    async def body(self) -> bytes:
        """The whole request body, which must be JSON by its header.

        Raises RequestRejected: UNSUPPORTED_CONTENT when it is not, or is compressed, BODY_TOO_LARGE as
        soon as it is known to be too long, OVERLOADED when all bodies together are; BODY_TOO_SLOW;
        CLIENT_LEFT."""
        self._check_content()
        limit = self._settings.max_body_bytes
        length = self.header(b"content-length")
        if length is not None and length.isdigit() and int(length) > limit:
            raise _too_large(limit)
        chunks, size, more = [], 0, True
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                while more:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise RequestRejected("The client left.", kind=Rejection.CLIENT_LEFT)
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    self._body_bytes = size
                    self._bodies.arrived(len(chunk))
                    if size > limit:
                        raise _too_large(limit)
                    chunks.append(chunk)
                    more = message.get("more_body", False)
        except TimeoutError:
            message_text = f"The request body did not arrive within {self._settings.body_timeout_s:g} s."
            raise RequestRejected(
                message_text, kind=Rejection.BODY_TOO_SLOW, code="request_timeout"
            ) from None
        finally:
            self._bodies.read(size)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def disconnected(self) -> None:
        """Wait until the client leaves (or its response is complete)."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def respond(
        self, status: int, body: bytes, headers: Sequence[Header] = (), content_type: bytes = JSON
    ) -> None:
        """A whole response."""
        length = (b"content-length", b"%d" % len(body))
        await self._begin(status, [(b"content-type", content_type), length, *headers])
        await self.write(body, more=False)

    async def redirect(self, location: bytes, query: bytes) -> None:
        """Have the client ask again at another address, with the same method, body and query."""
        target = location + b"?" + query if query else location
        await self._begin(307, [(b"location", target), (b"content-length", b"0")])
        await self.write(b"", more=False)

    async def answer_preflight(self) -> bool:
        """Tell a browser that a page may send its request; False when this is no such question, or the page
        may not."""
        asked = self.header(b"access-control-request-method") is not None
        if self._scope["method"] != "OPTIONS" or not asked:
            return False
        if not allows(self._settings.cors_origins, self.header(b"origin")):
            return False
        await self._begin(204, preflight_headers(self.header(b"access-control-request-headers")))
        await self.write(b"", more=False)
        return True

    async def reject(self, error: PenstockError, headers: Sequence[Header] = ()) -> None:
        """A whole response that says what is wrong, in the shape of the API that was asked."""
        headers = list(headers)
        retry_after_s = getattr(error, "retry_after_s", None)
        if retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % max(1, round(retry_after_s))))
        status = status_of(error)
        if status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if code_of(error) == UNSUPPORTED_ENCODING:
            headers.append((b"accept-encoding", b"identity"))
        body = self.error_object(error)
        if REQUEST_ID in body:
            body[REQUEST_ID] = self.request_id.decode()
        await self.respond(status, msgspec.json.encode(body), headers)

    async def begin_stream(self) -> None:
        """The head of an event stream. From here on a client that takes nothing for `client_stall_s` is
        dropped, and one that would be sent nothing for `sse_keep_alive_s` is sent a comment."""
        self._set_length = self._scope.get("extensions", {}).get(LENGTH_EXTENSION)
        if self._set_length is not None:
            self._set_length(sys.maxsize)
        # Proxies such as nginx would otherwise collect the events into large pieces.
        uncached = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        await self._begin(200, [(b"content-type", EVENT_STREAM), *uncached])
        self._check_stall()
        if self.allowed_silence_s is not None:
            self._check_silence(self.allowed_silence_s / 2)

    @property
    def allowed_silence_s(self) -> float | None:
        """How long a stream may send nothing; None: as long as it likes."""
        return self._settings.sse_keep_alive_s or None

    async def write(self, body: bytes, *, more: bool = True) -> None:
        """Send a part of the body; waits while the client is behind."""
        if self._set_length is not None and not more:
            self._set_length(len(body))
        self._writing_since = time.monotonic()
        await self._send({"type": "http.response.body", "body": body, "more_body": more})
        self._writing_since = None
        self._silent = False

    def write_now(self, body: bytes) -> bool:
        """Send a part of a begun stream without waiting. False: nothing is sent, use `write`."""
        self._silent = False
        return self._write_now is not None and self._write_now(body)

    def abort(self) -> None:
        """Drop the connection at once; `disconnected` returns thereafter."""
        abort = self._scope.get("extensions", {}).get(ABORT_EXTENSION)
        if abort is not None:
            abort()

    def close(self) -> None:
        """The exchange is over."""
        self._bodies.dropped(self._body_bytes)
        self._body_bytes = 0
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        if self._silence_timer is not None:
            self._silence_timer.cancel()

    async def _begin(self, status: int, headers: list[Header]) -> None:
        self.status = status
        # Under the second name Anthropic's clients look for it.
        headers += [(b"x-request-id", self.request_id), (b"request-id", self.request_id)]
        if self.more_headers is not None:
            headers += self.more_headers()
        if self._settings.cors_origins:
            headers += answer_headers(self._settings.cors_origins, self.header(b"origin"))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    def _check_stall(self) -> None:
        """Look again whenever a stall might have become too long: one timer, not one per write."""
        allowed_s = self._settings.client_stall_s
        stalled_s = 0.0 if self._writing_since is None else time.monotonic() - self._writing_since
        if stalled_s >= allowed_s:
            self.abort()
            return
        loop = asyncio.get_running_loop()
        self._stall_timer = loop.call_later(allowed_s - stalled_s, self._check_stall)

    def _check_silence(self, pause_s: float) -> None:
        """Look twice within the allowed silence, so that sending costs no more than a note of it."""
        if self._silent and self._writing_since is None:
            self.write_now(KEEP_ALIVE)
        self._silent = True
        self._silence_timer = asyncio.get_running_loop().call_later(pause_s, self._check_silence, pause_s)


def _shown(value: bytes) -> str:
    return value[:_SHOWN_CHARS].decode("latin-1").encode("unicode_escape").decode()


def _too_large(limit: int) -> RequestRejected:
    return RequestRejected(f"The request body is longer than {limit} bytes.", kind=Rejection.BODY_TOO_LARGE)
