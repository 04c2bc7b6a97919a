"""How `penstock status`, `scale`, `restart` and `down` reach a running supervisor.

A unix socket, open to its owner alone. One request and one response per connection, a line of JSON each;
both carry the protocol's version, and fields are only added.

A request expires a few seconds before its caller stops waiting for the answer. A supervisor that stood
still for longer refuses it, so that what was reported as failed is not carried out later.
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
_ANSWER_S = 5.0  # of these, for the answer to a request that came just in time


class ControlRequest(msgspec.Struct, omit_defaults=True):
    """What a command asks of the supervisor."""

    op: Literal["status", "scale", "restart", "down"]
    version: int = VERSION
    replicas: dict[str, int] = {}  # scale: by service name or label
    services: list[str] = []  # restart: names or labels; none: all
    expires_at: float = 0.0  # by this machine's monotonic clock, in seconds; 0: never


class LocalServiceStatus(msgspec.Struct):
    """One service and its replicas, leaving ones included."""

    name: str
    label: str
    wanted: int
    replicas: list[ReplicaStatus]


class LocalGraphStatus(msgspec.Struct):
    """A running graph."""

    graph: str
    pid: int
    ready: bool  # all replicas are
    uptime_s: float
    services: list[LocalServiceStatus]
    health: dict[str, dict[str, Any]] = {}  # each frontend's /health by URL
    notes: list[str] = []
    restarting: list[str] = []  # replicas that a rolling restart has yet to replace
    replaced: dict[str, str] = {}  # by the last restart: name of a replica, and of its successor
    restart_error: str = ""  # why the last one ended before its end


class ControlResponse(msgspec.Struct, omit_defaults=True):
    """The answer. `error` is a line for the user, empty when all went well."""

    version: int = VERSION
    error: str = ""
    status: LocalGraphStatus | None = None
    scaled: dict[str, tuple[int, int]] = {}  # service: replicas wanted before and now
    restarting: list[str] = []  # replicas that will be replaced, in order


Handler = Callable[[ControlRequest], Awaitable[ControlResponse]]


class ControlSocket:
    """The listening end, at the folder's socket. Errors of `handle` become responses."""

    def __init__(self, folder: StateFolder, handle: Handler) -> None:
        self._folder = folder
        self._handle = handle
        self._server: asyncio.Server | None = None
        self._made: os.stat_result | None = None

    async def open(self) -> None:
        """Listen, in place of an earlier socket. Raises ConfigError: it cannot be made."""
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
        """Whether its path still leads to it."""
        try:
            return self._made is not None and os.path.samestat(os.stat(self._folder.socket), self._made)
        except OSError:
            return False

    def close(self) -> None:
        """Stop listening, and remove it."""
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
            pass  # gone, silent, or a line too long: nobody to tell
        finally:
            writer.close()


@asynccontextmanager
async def serving_control(control: ControlSocket) -> AsyncIterator[None]:
    """Listen on this socket, which is gone afterwards."""
    await control.open()
    try:
        yield
    finally:
        control.close()


async def _respond(line: bytes, handle: Handler) -> ControlResponse:
    try:
        request = msgspec.json.decode(line, type=ControlRequest)
        if request.version > VERSION:
            return ControlResponse(error=f"the running supervisor knows version {VERSION} of control only")
        if 0 < request.expires_at < time.monotonic():
            return ControlResponse(error="this came too late: whoever asked is not waiting for it any more")
        return await handle(request)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        return ControlResponse(error=f"not a request: {error}")
    except PenstockError as error:
        return ControlResponse(error=str(error))


def call(folder: StateFolder, request: ControlRequest) -> ControlResponse:
    """Ask a running supervisor. Blocking.

    Raises:
        ConfigError: nobody is there, or it refuses.
        RemoteError: it does not answer, or not in words that this version knows.
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
        raise RemoteError(
            f"the supervisor of {folder.graph} answered what is no response: {error}"
        ) from error
    if response.error:
        raise ConfigError(response.error)
    return response
