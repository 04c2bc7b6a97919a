"""A conversation with an OpenAI-compatible server, streamed."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO
from urllib.parse import urlsplit

from penstock.errors import ConfigError, RemoteError
from penstock.net.address import unix_socket_path

_CONNECT_TIMEOUT_S = 5.0
_TOKEN_TIMEOUT_S = 300.0  # between two pieces of an answer; the first may wait in a queue
_LINE_BYTES_MAX = 4 * 1024 * 1024
_BODY_BYTES_MAX = 1024 * 1024
_ANSWER_BYTES_MAX = 64 * 1024 * 1024


class ChatClient:
    """Speaks to one server; a connection per call."""

    def __init__(self, url: str, api_key: str = "") -> None:
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._socket_path = unix_socket_path(url)
        if self._socket_path:
            self.url, self._path = url, ""
            return
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--url: expected http://HOST:PORT or unix:/PATH, got {url!r}")
        try:
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"--url: {error}") from error
        self.url = f"{parts.scheme}://{parts.netloc}"
        self._host, self._port, self._secure = parts.hostname, port, parts.scheme == "https"
        self._path = parts.path.rstrip("/").removesuffix("/v1")

    def first_model(self) -> str:
        """The first model served. Raises RemoteError."""
        with self._call("GET", "/v1/models", None) as response:
            try:
                return str(json.loads(response.read(_BODY_BYTES_MAX))["data"][0]["id"])
            except (ValueError, LookupError, TypeError) as error:
                raise RemoteError(f"{self.url} serves no model yet") from error

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """A whole answer. Raises RemoteError."""
        with self._call(method, path, body) as response:
            try:
                answer: dict[str, Any] = json.loads(response.read(_ANSWER_BYTES_MAX))
            except ValueError as error:
                raise RemoteError(f"{self.url} answered {path} with something that is no JSON") from error
            return answer

    def stream(self, request: dict[str, Any]) -> Iterator[str]:
        """The pieces of an answer as they come. Raises RemoteError."""
        for payload in self.events("/v1/chat/completions", request | {"stream": True}):
            if payload == b"[DONE]":
                return
            yield _text_of(payload)
        raise RemoteError("the connection ended before the answer did")

    def events(
        self, path: str, body: dict[str, Any], on_begin: Callable[[], object] = lambda: None
    ) -> Iterator[bytes]:
        """The data of an event stream's events as they come, to its end. Calls `on_begin` once the answer
        has begun. Raises RemoteError."""
        with self._call("POST", path, body) as response:
            on_begin()
            while line := self._read_line(response):
                if line.startswith(b"data:"):
                    yield line.removeprefix(b"data:").strip()

    @contextmanager
    def _call(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> Iterator[http.client.HTTPResponse]:
        """One request; its connection is closed however the caller leaves."""
        connection = self._connection()
        try:
            connection.connect()
            if connection.sock is not None:
                connection.sock.settimeout(_TOKEN_TIMEOUT_S)
            text = json.dumps(body).encode() if body is not None else None
            connection.request(method, self._path + path, text, self._headers)
            response = connection.getresponse()
            if response.status != http.HTTPStatus.OK:
                raise RemoteError(_reason_of(response))
            yield response
        except TimeoutError as error:
            raise RemoteError(f"{self.url} does not answer") from error
        except (OSError, http.client.HTTPException) as error:
            raise RemoteError(f"{self.url}: {error or type(error).__name__}") from error
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        if self._socket_path:
            return _UnixConnection(self._socket_path)
        if self._secure:
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(
                self._host, self._port, timeout=_CONNECT_TIMEOUT_S, context=context
            )
        return http.client.HTTPConnection(self._host, self._port, timeout=_CONNECT_TIMEOUT_S)

    def _read_line(self, response: http.client.HTTPResponse) -> bytes:
        line = response.readline(_LINE_BYTES_MAX)
        if len(line) == _LINE_BYTES_MAX:
            raise RemoteError(f"{self.url} sent a line of more than {_LINE_BYTES_MAX} bytes")
        return line


class _UnixConnection(http.client.HTTPConnection):
    """To a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_CONNECT_TIMEOUT_S)
        self._socket_path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._socket_path)


class Conversation:
    """What was said so far, and the way to say more."""

    def __init__(self, client: ChatClient, model: str, system: str, options: dict[str, Any]) -> None:
        """`options`: further fields of each request, such as max_tokens."""
        self.model = model
        self._client = client
        self._options = options
        self._opening = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._opening)

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = list(self._opening)

    def say(self, text: str, out: TextIO) -> None:
        """Ask, and write the answer as it comes. Ctrl-C keeps what came so far.

        Raises:
            RemoteError: there is no answer; the conversation is as it was before.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        pieces: list[str] = []
        request = {"model": self.model, "messages": asked, **self._options}
        try:
            for piece in self._client.stream(request):
                pieces.append(piece)
                out.write(piece)
                out.flush()
        except KeyboardInterrupt:
            out.write(" [stopped]")
        out.write("\n")
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]


def converse(conversation: Conversation, lines: Callable[[], str], out: TextIO, errors: TextIO) -> None:
    """Read lines and answer them until the end of input or /exit.

    Args:
        lines: the next line of the user; EOFError or KeyboardInterrupt for no more.
    """
    while True:
        try:
            text = lines().strip()
        except (EOFError, KeyboardInterrupt):
            out.write("\n")
            return
        if text in ("/exit", "/quit"):
            return
        if text == "/reset":
            conversation.reset()
            out.write("forgotten\n")
        elif text.startswith("/"):
            out.write("commands: /reset, /exit\n")
        elif text:
            try:
                conversation.say(text, out)
            except RemoteError as error:
                errors.write(f"penstock: {error}\n")


def _text_of(payload: bytes) -> str:
    """The text in one event's JSON. Raises RemoteError for an event that tells of a failure."""
    try:
        event = json.loads(payload)
        if "error" in event:
            raise RemoteError(str(event["error"].get("message", event["error"])))
        choices = event.get("choices") or []
        return "".join(choice["delta"].get("content") or "" for choice in choices)
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise RemoteError(f"not an event of a chat stream: {payload[:100]!r}") from error


def _reason_of(response: http.client.HTTPResponse) -> str:
    """What a response that is no success says of itself."""
    body = response.read(_BODY_BYTES_MAX)
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = body[:200].decode(errors="replace").strip() or response.reason
    return f"{response.status}: {message}"
