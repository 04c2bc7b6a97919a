"""Peers that nobody wants: they connect and say nothing, or nonsense, or ask and do not stay."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from checks.faults.clients import sim_question

_PIECES = (
    b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
    b"\x00" * 64,
    b"\xff\xff\xff\xff",
    b"\x00\x00\x00\x05hello",
    os.urandom(4096),
    b"POST /v1/completions HTTP/1.1\r\ncontent-length: 999999999999\r\n\r\n{",
    b"A" * 200_000,
)


async def garbage(host: str, port: int) -> None:
    """Every kind of it, several times over; some connections stay open for a while."""
    await asyncio.gather(*(_say(host, port, piece) for piece in _PIECES * 4))


async def _say(host: str, port: int, content: bytes) -> None:
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(5.0):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(content)
                await writer.drain()
                await reader.read(1000)
                await asyncio.sleep(1.0)
            finally:
                writer.transport.abort()


async def connect_only(url: str, count: int, seconds: float) -> None:
    """Connections that ask for nothing."""
    parts = urlsplit(url)
    sockets = []
    for _ in range(count):
        stranger = socket.socket()
        stranger.setblocking(False)
        stranger.connect_ex((parts.hostname, parts.port))
        sockets.append(stranger)
    await asyncio.sleep(seconds)
    for stranger in sockets:
        stranger.close()


async def hang_up(urls: Sequence[str], count: int) -> None:
    """Ask for long answers and leave, each a little later than the one before."""
    await asyncio.gather(*(_ask(urls[at % len(urls)], at, 0.02 * at, 4096) for at in range(count)))


async def do_not_read(urls: Sequence[str], count: int, seconds: float) -> None:
    """Ask for long answers through small windows, and read nothing."""
    await asyncio.gather(*(_ask(urls[at % len(urls)], at, seconds, 0) for at in range(count)))


async def _ask(url: str, number: int, seconds: float, read_bytes: int) -> None:
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()
    question = sim_question(9_000_000 + 2 * number, 200, 400)
    body = json.dumps(question.body | {"stream": True}).encode()
    head = f"POST {question.path} HTTP/1.1\r\nhost: lab\r\ncontent-type: application/json\r\n"
    with socket.socket() as stranger, contextlib.suppress(OSError):
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        stranger.setblocking(False)
        await loop.sock_connect(stranger, (parts.hostname, parts.port))
        await loop.sock_sendall(stranger, f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        if read_bytes:
            await loop.sock_recv(stranger, read_bytes)
        await asyncio.sleep(seconds)
