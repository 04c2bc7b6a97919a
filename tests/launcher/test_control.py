from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from penstock.errors import ConfigError, RemoteError
from penstock.launcher.control import ControlRequest, ControlResponse, ControlSocket, call, serving_control
from penstock.launcher.state import StateFolder


@pytest.fixture
async def folder(tmp_path: Path) -> AsyncIterator[StateFolder]:
    folder = StateFolder(tmp_path, "toy")
    folder.prepare()

    async def handle(request: ControlRequest) -> ControlResponse:
        if request.op == "down":
            raise ConfigError("not now")
        return ControlResponse(scaled={name: (0, count) for name, count in request.replicas.items()})

    async with serving_control(ControlSocket(folder, handle)):
        yield folder
    assert "control.sock" not in os.listdir(folder.path)


def raw(folder: StateFolder, line: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(folder.socket)
        connection.sendall(line)
        with connection.makefile("rb") as stream:
            return stream.readline()


async def test_a_request_and_its_response(folder: StateFolder) -> None:
    request = ControlRequest(op="scale", replicas={"A": 3})
    assert (await asyncio.to_thread(call, folder, request)).scaled == {"A": (0, 3)}
    assert os.stat(folder.socket).st_mode & 0o777 == 0o600


async def test_a_refusal_is_raised_at_the_caller(folder: StateFolder) -> None:
    with pytest.raises(ConfigError, match=r"^not now$"):
        await asyncio.to_thread(call, folder, ControlRequest(op="down"))


@pytest.mark.parametrize("line", [b"\n", b"{\n", b'{"op": "explode"}\n', b"\xff\n", b'"x"\n'])
async def test_garbage_is_answered(folder: StateFolder, line: bytes) -> None:
    assert b"not a request" in await asyncio.to_thread(raw, folder, line)


async def test_a_newer_version_is_told(folder: StateFolder) -> None:
    answer = await asyncio.to_thread(raw, folder, b'{"op": "status", "version": 2, "further": 1}\n')
    assert b"only knows version 1 of this protocol" in answer


async def test_a_request_that_was_read_too_late_is_not_carried_out(folder: StateFolder) -> None:
    late = b'{"op": "scale", "replicas": {"A": 3}, "expires_at": %.3f}\n' % (time.monotonic() - 0.001)
    assert b"the request came too late" in await asyncio.to_thread(raw, folder, late)


async def test_a_caller_that_leaves_harms_nothing(folder: StateFolder) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(folder.socket)
    assert await asyncio.to_thread(call, folder, ControlRequest(op="status"))


def test_a_call_without_a_supervisor_says_that_it_is_not_running(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path, "toy")
    with pytest.raises(ConfigError, match=r"^toy is not running$"):
        call(folder, ControlRequest(op="status"))
    folder.prepare()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(folder.socket)
    with pytest.raises(ConfigError, match=r"^toy is not running$"):  # a stale socket
        call(folder, ControlRequest(op="status"))


async def test_an_answer_that_is_none(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path, "toy")
    folder.prepare()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"what?\n")
        writer.close()

    server = await asyncio.start_unix_server(answer, folder.socket)
    with pytest.raises(RemoteError, match="sent an invalid response"):
        await asyncio.to_thread(call, folder, ControlRequest(op="status"))
    server.close()
    await server.wait_closed()
