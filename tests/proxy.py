"""A TCP proxy on loopback whose connections can be cut, silenced, delayed and slowed down."""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass

_CHUNK_BYTES = 64 * 1024
_BUFFER_BYTES = 64 * 1024  # of a silent peer, as a kernel's: what is beyond makes the writer wait


@dataclass(slots=True)
class Weather:
    """How a proxy treats what passes. `up` goes from the one who connected to the one who listens."""

    refused: bool = False  # nobody gets through: connections are reset
    hold_up: bool = False  # nothing more passes in this direction; nobody is told
    hold_down: bool = False
    delay_s: float = 0.0  # for each chunk
    bytes_per_s: float = 0.0  # of one connection and direction; 0: no limit


class Proxy:
    """Listens at one address for another, with `tls` if given. Use from one event loop."""

    def __init__(
        self, listen: tuple[str, int], target: tuple[str, int], tls: ssl.SSLContext | None = None
    ) -> None:
        self.listen = listen
        self._tls = tls
        self.target = target
        self._weather = Weather()
        self._changed = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def connected(self) -> bool:
        """Whether anybody is connected through it."""
        return bool(self._writers)

    async def start(self) -> None:
        self._server = await asyncio.start_server(
            self._accept, *self.listen, limit=_BUFFER_BYTES, ssl=self._tls
        )

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def set(self, weather: Weather) -> None:
        """From now on, for connections there are and those to come."""
        self._weather = weather
        if weather.refused:
            self.cut()
        self._changed.set()
        self._changed = asyncio.Event()

    def cut(self) -> None:
        """Reset all connections."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        far: asyncio.StreamWriter | None = None
        try:
            if self._weather.refused:
                return
            far_reader, far = await asyncio.open_connection(*self.target, limit=_BUFFER_BYTES)
            self._writers.add(far)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._copy(reader, far, up=True))
                both.create_task(self._copy(far_reader, writer, up=False))
        except* (OSError, asyncio.CancelledError):
            pass  # an end hung up, or the lab ends
        finally:
            for end in (writer, far):
                if end is not None:
                    self._writers.discard(end)
                    end.transport.abort()
            self._tasks.discard(task)

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool) -> None:
        while True:
            await self._clear(up)
            chunk = await reader.read(_CHUNK_BYTES)
            await self._clear(up)
            if not chunk:
                break
            if self._weather.bytes_per_s:
                await asyncio.sleep(len(chunk) / self._weather.bytes_per_s)
            if self._weather.delay_s:
                await asyncio.sleep(self._weather.delay_s)
            if writer.is_closing():
                return
            writer.write(chunk)
            await writer.drain()
        if not writer.is_closing() and writer.can_write_eof():  # not with TLS
            writer.write_eof()

    async def _clear(self, up: bool) -> None:
        """Wait until this direction is open."""
        while self._weather.hold_up if up else self._weather.hold_down:
            await self._changed.wait()
