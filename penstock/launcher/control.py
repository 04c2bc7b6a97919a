"""How `penstock status`, `scale`, `restart` and `down` reach a running supervisor.

A unix socket, open to its owner alone. One request and one response per connection, a line of JSON each;
both carry the protocol's version, and fields are only added.
"""

from __future__ import annotations

import asyncio
import os
import socket
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


class ControlRequest(msgspec.Struct, omit_defaults=True):
    """What a command asks of the supervisor."""

    op: Literal["status", "scale", "restart", "down"]
    version: int = VERSION
    replicas: dict[str, int] = {}  # scale: by service name or label
    services: list[str] = []  # restart: names or labels; none: all


class ServiceStatus(msgspec.Struct):
    """One service and its replicas, leaving ones included."""

    name: str
    label: str
    wanted: int
    replicas: list[ReplicaStatus]


class GraphStatus(msgspec.Struct):
    """A running graph."""

    graph: str
    pid: int
    ready: bool  # all replicas are
    uptime_s: float
    services: list[ServiceStatus]
    health: dict[str, dict[str, Any]] = {}  # each frontend's /health by URL
    notes: list[str] = []
    restarting: list[str] = []  # replicas that a rolling restart has yet to replace
    restart_error: str = ""  # why the last one ended before its end


class ControlResponse(msgspec.Struct, omit_defaults=True):
    """The answer. `error` is a line for the user, empty when all went well."""

    version: int = VERSION
    error: str = ""
    status: GraphStatus | None = None
    scaled: dict[str, tuple[int, int]] = {}  # service: replicas wanted before and now
    restarting: list[str] = []  # replicas that will be replaced, in order


Handler = Callable[[ControlRequest], Awaitable[ControlResponse]]


@asynccontextmanager
async def serving_control(folder: StateFolder, handle: Handler) -> AsyncIterator[None]:
    """Listen on the folder's socket, which is gone afterwards. Errors of `handle` become responses."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            line = await asyncio.wait_for(reader.readline(), _REQUEST_TIMEOUT_S)
            writer.write(msgspec.json.encode(await _respond(line, handle)) + b"\n")
            await asyncio.wait_for(writer.drain(), _REQUEST_TIMEOUT_S)
        except (OSError, ValueError, TimeoutError):
            pass  # gone, silent, or a line too long: nobody to tell
        finally:
            writer.close()

    path = folder.socket
    server = await asyncio.start_unix_server(answer, path, limit=_LINE_BYTES_MAX)
    os.chmod(path, 0o600)  # its folder is 0700 from the start
    try:
        yield
    finally:
        server.close()
        with suppress(FileNotFoundError):  # somebody cleared the folder
            os.unlink(path)


async def _respond(line: bytes, handle: Handler) -> ControlResponse:
    try:
        request = msgspec.json.decode(line, type=ControlRequest)
        if request.version > VERSION:
            return ControlResponse(error=f"the running supervisor knows version {VERSION} of control only")
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
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_CALL_TIMEOUT_S)
            connection.connect(folder.socket)
            connection.sendall(msgspec.json.encode(request) + b"\n")
            with connection.makefile("rb") as stream:
                line = stream.readline(_LINE_BYTES_MAX)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise ConfigError(f"{folder.graph} is not running") from error
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
