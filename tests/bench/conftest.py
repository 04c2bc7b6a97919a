"""A tiny HTTP/1.1 server that answers like OpenAI's API, for the load generator's tests."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import pytest


@dataclass
class CompletionServer:
    """Streams `tokens` chunks per answer, `gap_s` apart, on an ephemeral port of 127.0.0.1."""

    tokens: int = 5
    gap_s: float = 0.0
    first_s: float = 0.0
    trouble: dict[int, str] = field(default_factory=dict)  # number of a request -> what goes wrong
    requests: list[dict[str, Any]] = field(default_factory=list)
    refuses: tuple[str, dict[str, Any]] | None = None  # with which status and error, if not streamed
    connections: int = 0
    headers: list[str] = field(default_factory=list)  # of the latest request

    async def __aenter__(self) -> CompletionServer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._writers: set[asyncio.StreamWriter] = set()
        self._handlers: set[asyncio.Task[Any]] = set()
        self._closing = asyncio.Event()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        self._closing.set()
        for writer in self._writers:
            writer.close()
        if self._handlers:
            await asyncio.wait(self._handlers)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        handler = asyncio.current_task()
        assert handler is not None
        self._handlers.add(handler)
        try:
            while head := await _head(reader):
                self.headers = head
                length = next(int(line[15:]) for line in head if line.lower().startswith("content-length:"))
                body = await reader.readexactly(length)
                if not await self._answer(head[0].split(" ")[1], body, writer):
                    return
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client left
        finally:
            self._writers.discard(writer)
            self._handlers.discard(handler)
            writer.close()

    async def _answer(self, path: str, body: bytes, writer: asyncio.StreamWriter) -> bool:
        if path.endswith("/models"):
            return await _document(writer, {"data": [{"id": "tiny"}]})
        request = json.loads(body)
        words = sum(len(message["content"].split()) for message in request["messages"])
        if not request.get("stream"):
            if self.refuses is not None:
                status, error = self.refuses
                return await _document(writer, {"error": error}, status)
            return await _document(writer, {"usage": {"prompt_tokens": 2 * words + 7}})
        self.requests.append(request)
        trouble = self.trouble.get(len(self.requests), "")
        if trouble == "429":
            return await _document(writer, {"error": {"message": "busy"}}, "429 Too Many Requests")
        if trouble == "hang":
            await self._closing.wait()
            return False
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        await asyncio.sleep(self.first_s)
        for number in range(self.tokens):
            if number == 2 and trouble == "cut":
                return False
            if number == 2 and trouble == "error":
                await _event(writer, {"error": {"message": "engine died"}})
                break
            await _event(writer, {"choices": [{"delta": {"content": f"t{number} "}}]})
            await asyncio.sleep(self.gap_s)
        else:
            if trouble != "truncated":
                await _event(writer, {"choices": [{"delta": {}, "finish_reason": "length"}]})
        usage = {
            "prompt_tokens": 2 * words,
            "completion_tokens": self.tokens,
            "prompt_tokens_details": {"cached_tokens": words},
        }
        await _event(writer, {"choices": [], "usage": usage})
        done = b": comment\n\ndata: [DONE]\n\n"
        writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(done), done))
        await writer.drain()
        return True


async def _head(reader: asyncio.StreamReader) -> list[str]:
    try:
        return (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    except asyncio.IncompleteReadError:
        return []


async def _document(writer: asyncio.StreamWriter, document: object, status: str = "200 OK") -> bool:
    body = json.dumps(document).encode()
    writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()
    return True


async def _event(writer: asyncio.StreamWriter, chunk: object) -> None:
    event = b"data: " + json.dumps(chunk).encode() + b"\n\n"
    writer.write(b"%x\r\n%s\r\n" % (len(event), event))
    await writer.drain()


@pytest.fixture
def completion_server() -> type[CompletionServer]:
    return CompletionServer
