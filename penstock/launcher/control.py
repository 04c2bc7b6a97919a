"""How `penstock status`, `scale`, `restart` and `down` reach a running supervisor.

The supervisor listens on a Unix socket that only its owner can open. A connection carries one request and
one response, each a line of JSON. Both carry the protocol's version. New versions only add fields.

A request expires a few seconds before its caller stops waiting for the response. A supervisor that was
suspended for longer refuses the request. So it never carries out later what the command reported as failed.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Literal

import msgspec

from penstock.errors import ConfigError, PenstockError, RemoteError
from penstock.launcher.replica import ReplicaStatus
from penstock.launcher.state import StateFolder

VERSION = 1

_LINE_BYTES_MAX = 1024 * 1024
_REQUEST_TIMEOUT_S = 5.0
_CALL_TIMEOUT_S = 15.0
_ANSWER_S = 5.0  # of the call timeout, for the response to a request that came just before it expired


class ControlRequest(msgspec.Struct, omit_defaults=True):
    """What a command asks of the supervisor."""

    op: Literal["status", "scale", "restart", "down"]
    version: int = VERSION
    replicas: dict[str, int] = {}  # scale: by service name or label
    services: list[str] = []  # restart: names or labels; none: all
    expires_at: float = 0.0  # by this machine's monotonic clock, in seconds; 0: never


class LocalServiceStatus(msgspec.Struct):
    """One service and its replicas, including those that are stopping."""

    name: str
    label: str
    wanted: int
    replicas: list[ReplicaStatus]


class LocalGraphStatus(msgspec.Struct):
    """A running graph."""

    graph: str
    pid: int
    ready: bool  # whether all replicas are ready
    uptime_s: float
    services: list[LocalServiceStatus]
    health: dict[str, dict[str, Any]] = {}  # each frontend's /health by URL
    notes: list[str] = []
    restarting: list[str] = []  # replicas that a rolling restart has yet to replace
    replaced: dict[str, str] = {}  # the last restart's: name of a replica -> name of its successor
    restart_error: str = ""  # why the last restart stopped early


class ControlResponse(msgspec.Struct, omit_defaults=True):
    """The response. `error` is a line for the user; empty when the request succeeded."""

    version: int = VERSION
    error: str = ""
    status: LocalGraphStatus | None = None
    scaled: dict[str, tuple[int, int]] = {}  # service: replicas wanted before and now
    restarting: list[str] = []  # replicas that will be replaced, in order


Handler = Callable[[ControlRequest], Awaitable[ControlResponse]]


class ControlSocket:
    """The supervisor's end. `handle` answers each request; an error that it raises becomes a response."""

    def __init__(self, folder: StateFolder, handle: Handler) -> None:
        self._folder = folder
        self._handle = handle
        self._server: asyncio.Server | None = None
        self._made: os.stat_result | None = None

    async def open(self) -> None:
        """Listen, and replace an earlier socket. Raises ConfigError if the socket cannot be made."""
        path = self._folder.socket
        if self._server is not None:
            self._server.close()
        try:
            self._server = await asyncio.start_unix_server(self._answer, path, limit=_LINE_BYTES_MAX)
            os.chmod(path, 0o600)  # its folder is 0700 from the start
            self._made = os.stat(path)
        except OSError as error:
            raise ConfigError(f"cannot listen at {path}: {error.strerror}") from error

    def is_reachable(self) -> bool:
        """Whether the socket's path still leads to this socket."""
        try:
            return self._made is not None and os.path.samestat(os.stat(self._folder.socket), self._made)
        except OSError:
            return False

    def close(self) -> None:
        """Stop listening, and remove the socket's file."""
        reachable = self.is_reachable()
        if self._server is not None:
            self._server.close()
        if reachable:
            with suppress(FileNotFoundError):  # closed by Python 3.13, which removes it, too
                os.unlink(self._folder.socket)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            line = await asyncio.wait_for(reader.readline(), _REQUEST_TIMEOUT_S)
            writer.write(msgspec.json.encode(await _respond(line, self._handle)) + b"\n")
            await asyncio.wait_for(writer.drain(), _REQUEST_TIMEOUT_S)
        except (OSError, ValueError, TimeoutError):
            pass  # the caller is gone or silent, or sent too long a line: no response can reach it
        finally:
            writer.close()


@asynccontextmanager
async def serving_control(control: ControlSocket) -> AsyncIterator[None]:
    """Listen on this socket while the block runs, and remove it afterwards."""
    await control.open()
    try:
        yield
    finally:
        control.close()


async def _respond(line: bytes, handle: Handler) -> ControlResponse:
    try:
        request = msgspec.json.decode(line, type=ControlRequest)
        if request.version > VERSION:
            return ControlResponse(
                error=f"the running supervisor only knows version {VERSION} of this protocol"
            )
        if 0 < request.expires_at < time.monotonic():
            return ControlResponse(error="the request came too late: its sender waits no longer")
        return await handle(request)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        return ControlResponse(error=f"not a request: {error}")
    except PenstockError as error:
        return ControlResponse(error=str(error))


def call(folder: StateFolder, request: ControlRequest) -> ControlResponse:
    """Send a request to a running supervisor, and wait for the response.

    Raises:
        ConfigError: the graph is not running, or the supervisor refuses the request.
        RemoteError: the supervisor does not respond, or this version cannot read its response.
    """
    request = msgspec.structs.replace(request, expires_at=time.monotonic() + _CALL_TIMEOUT_S - _ANSWER_S)
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_CALL_TIMEOUT_S)
            connection.connect(folder.socket)
            connection.sendall(msgspec.json.encode(request) + b"\n")
            with connection.makefile("rb") as stream:
                line = stream.readline(_LINE_BYTES_MAX)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise ConfigError(f"{folder.graph} is not running") from error
    except TimeoutError as error:
        raise RemoteError(
            f"the supervisor of {folder.graph} did not answer within {_CALL_TIMEOUT_S:g} s; it will not act"
            " on this later"
        ) from error
    except OSError as error:
        raise RemoteError(f"the supervisor of {folder.graph} does not answer: {error}") from error
    try:
        response = msgspec.json.decode(line, type=ControlResponse)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RemoteError(f"the supervisor of {folder.graph} sent an invalid response: {error}") from error
    if response.error:
        raise ConfigError(response.error)
    return response
