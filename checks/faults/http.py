"""HTTP/1.1 over asyncio streams, as little as the lab needs: it must see how every connection ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

_GET_TIMEOUT_S = 3.0


class Cut(Exception):
    """The connection ended before the answer did."""


class Answer:
    """One response: its status, then its body as it comes."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self.status = 0
        self._headers: dict[str, str] = {}

    async def head(self) -> None:
        line = await self._line()
        self.status = int(line.split()[1])
        while line := await self._line():
            name, _, value = line.partition(":")
            self._headers[name.lower()] = value.strip()

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body. Raises Cut when it is not whole."""
        if self._headers.get("transfer-encoding") != "chunked":
            yield await self._exactly(int(self._headers.get("content-length", "0")))
            return
        while size := int(await self._line(), 16):
            yield await self._exactly(size)
            await self._line()
        await self._line()

    async def body(self) -> bytes:
        return b"".join([chunk async for chunk in self.chunks()])

    async def _line(self) -> str:
        line = await self._reader.readline()
        if not line.endswith(b"\n"):
            raise Cut("no more bytes")
        return line.decode().strip()

    async def _exactly(self, count: int) -> bytes:
        try:
            return await self._reader.readexactly(count)
        except asyncio.IncompleteReadError:
            raise Cut("no more bytes") from None


@contextlib.asynccontextmanager
async def request(url: str, body: dict[str, Any] | None = None) -> AsyncIterator[Answer]:
    """One request on a connection of its own; its head has arrived. Raises OSError and Cut."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        content = json.dumps(body).encode() if body is not None else b""
        head = f"{'POST' if body is not None else 'GET'} {parts.path} HTTP/1.1\r\nhost: {parts.netloc}\r\n"
        head += (
            f"content-type: application/json\r\ncontent-length: {len(content)}\r\nconnection: close\r\n\r\n"
        )
        writer.write(head.encode() + content)
        answer = Answer(reader)
        await answer.head()
        yield answer
    except ConnectionError as error:
        raise Cut(str(error)) from error
    finally:
        writer.transport.abort()


async def get(url: str) -> tuple[int, bytes]:
    """Status and body. Raises OSError, or TimeoutError after a few seconds."""
    async with asyncio.timeout(_GET_TIMEOUT_S):
        try:
            async with request(url) as answer:
                return answer.status, await answer.body()
        except Cut as error:
            raise ConnectionError(str(error)) from error
