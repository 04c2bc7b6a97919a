"""KV events on their way from vLLM's core processes: subscribed, without gaps, a batch at a time.

Each rank publishes on a socket of its own, numbering its payloads from 0, and answers requests for those it
still has. What is missing is asked for; what cannot be had any more costs all that was known of that rank.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import socket
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from penstock.engines.vllm.kv_events import CacheEvents, Changes
from penstock.errors import ProtocolError, RemoteError

log = logging.getLogger("penstock.engine")

_NUMBER_BYTES = 8
_MAX_NUMBER = 2**62
_END = b"\xff" * _NUMBER_BYTES  # the number that ends a replay: -1
_LOOPBACK = "127.0.0.1"
_PREFIX = "penstock-vllm-"
_DEAD_AFTER_S = 60.0  # when a socket that nobody listens at has hardly just been made


class FeedSettings(msgspec.Struct, frozen=True):
    """Limits of a feed."""

    replay_s: float = 10.0
    """For an answer to a replay request. vLLM looks for them every 0.1 s, and between payloads."""

    quiet_s: float = 1.0
    """After so long without a payload, once, it is asked whether the last ones got lost: before the first,
    say, when the subscription may have come too late. Nothing else would tell."""

    max_batch: int = 256
    """Payloads taken at once, so that a burst does not hold up the event loop."""

    max_replayed: int = 100_000
    """Payloads of one replay. vLLM keeps 10,000."""

    max_unread: int = 100_000
    """Payloads that ZMQ may buffer while the event loop is busy; beyond it, the rest is replayed."""


class EventEndpoints(msgspec.Struct, frozen=True):
    """Where one rank publishes, and where it is asked for what was missed."""

    publish: str
    replay: str


class EventSources:
    """Endpoints for so many ranks of one engine, on this machine, for nobody else.

    One rank uses sockets in a directory that only this user may enter. vLLM numbers the endpoints of
    several ranks by TCP ports, so those are on the loopback interface.
    """

    def __init__(self, ranks: int) -> None:
        self.directory: Path | None = None
        if ranks == 1:
            remove_dead(Path(tempfile.gettempdir()))
            self.directory = Path(tempfile.mkdtemp(prefix=_PREFIX))
            # Also when this process ends, unless suddenly: then vLLM's processes do it (guard.py).
            self._remove = weakref.finalize(self, shutil.rmtree, self.directory, ignore_errors=True)
            base = EventEndpoints(f"ipc://{self.directory}/events", f"ipc://{self.directory}/replay")
            self.ranks: Mapping[int, EventEndpoints] = {0: base}
            return
        publish, replay = free_ports(ranks), free_ports(ranks)
        self.ranks = {
            rank: EventEndpoints(
                f"tcp://{_LOOPBACK}:{publish + rank}", f"tcp://{_LOOPBACK}:{replay + rank}"
            )
            for rank in range(ranks)
        }

    def close(self) -> None:
        """Remove the directory."""
        if self.directory is not None:
            self._remove()


def remove_dead(parent: Path) -> None:
    """Remove what is left of engines that were killed together with all that could have done it."""
    for events in parent.glob(f"{_PREFIX}*/events"):
        try:
            if time.time() - events.stat().st_mtime < _DEAD_AFTER_S:
                continue
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(str(events))
        except ConnectionRefusedError:
            shutil.rmtree(events.parent, ignore_errors=True)
        except OSError:  # somebody else's, or gone meanwhile
            continue


class EventFeed:
    """Follows all ranks of one engine.

    Args:
        on_changes: gets what has changed, for all payloads that could be read at once.
    """

    def __init__(
        self,
        events: CacheEvents,
        sources: EventSources,
        on_changes: Callable[[Changes], None],
        settings: FeedSettings | None = None,
    ) -> None:
        self._events = events
        self._sources = sources
        self._on_changes = on_changes
        self._settings = settings or FeedSettings()
        self._context: Any = None
        self._followers: list[_Follower] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Be subscribed to every rank, and know what it has published so far."""
        import zmq.asyncio

        self._context = zmq.asyncio.Context()
        self._followers = [
            _Follower(rank, endpoints, self._context, self._settings)
            for rank, endpoints in self._sources.ranks.items()
        ]
        for follower in self._followers:
            try:
                await follower.catch_up(self._events)
            except Exception as error:  # noqa: BLE001 logged; routing by load alone is better than no engine
                self._give_up(follower, error)
            else:
                self._tasks.append(
                    asyncio.create_task(self._follow(follower), name=f"kv events {follower.rank}")
                )
        self._report()

    async def close(self) -> None:
        """Stop following."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._context is not None:
            self._context.destroy(linger=0)
        self._sources.close()

    async def _follow(self, follower: _Follower) -> None:
        try:
            while True:
                await follower.take(self._events)
                self._report()
        except Exception as error:  # noqa: BLE001 as above
            self._give_up(follower, error)

    def _give_up(self, follower: _Follower, error: Exception) -> None:
        """Forget this rank's cache: wrong hints are worse for routing than none."""
        log.error(
            "cache events stopped, so the router no longer knows what rank %d has cached: %s",
            follower.rank,
            error,
            exc_info=None if isinstance(error, ProtocolError) else error,
        )
        follower.close()
        self._events.forget(follower.rank)
        self._report()

    def _report(self) -> None:
        changes = self._events.drain()
        if changes.stored or changes.removed:
            self._on_changes(changes)


class _Follower:
    """One rank's subscription."""

    def __init__(self, rank: int, endpoints: EventEndpoints, context: Any, settings: FeedSettings) -> None:
        import zmq

        self.rank = rank
        self._endpoints = endpoints
        self._context = context
        self._settings = settings
        self._next = 0  # number of the next payload
        self._certain = False  # that there is none yet
        self._socket = context.socket(zmq.SUB)
        self._socket.set_hwm(settings.max_unread)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        if endpoints.publish.startswith("tcp:"):
            self._socket.bind(endpoints.publish)  # without a wildcard, vLLM is the one that connects
        else:
            self._socket.connect(endpoints.publish)

    def close(self) -> None:
        self._socket.close(linger=0)

    async def catch_up(self, events: CacheEvents) -> None:
        """Apply what was published before."""
        await self._fill(events, 0)

    async def take(self, events: CacheEvents) -> None:
        """Apply the next payload, and those that can be read with it. Raises ProtocolError."""
        import zmq

        if not self._certain and not await self._socket.poll(self._settings.quiet_s * 1e3):
            self._certain = True
            await self._fill(events, self._next)
            return
        frames = await self._socket.recv_multipart()
        self._certain = False
        for _ in range(self._settings.max_batch):
            await self._take(events, frames)
            try:
                frames = await self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
        await self._take(events, frames)

    async def _take(self, events: CacheEvents, frames: list[bytes]) -> None:
        if len(frames) != 3:
            raise ProtocolError(f"KV events of rank {self.rank}: {len(frames)} frames, expected 3")
        number = self._number(frames[1])
        if number > self._next:
            await self._fill(events, number)
        self._apply(events, number, frames[2])

    async def _fill(self, events: CacheEvents, end: int) -> None:
        """Get what is missing before payload number `end`. What cannot be had any more costs all that was
        known before it."""
        try:
            missed = await self._replay(self._next)
        except RemoteError as error:
            log.warning("KV events of rank %d from number %d on: %s", self.rank, self._next, error)
            missed = []
        for number, payload in missed:
            if number > self._next:
                self._skip_to(events, number)
            self._apply(events, number, payload)
        if end > self._next:
            self._skip_to(events, end)

    def _skip_to(self, events: CacheEvents, number: int) -> None:
        log.warning(
            "KV events %d to %d of rank %d are lost: forgetting its cache",
            self._next,
            number - 1,
            self.rank,
        )
        events.forget(self.rank)
        self._next = number

    def _apply(self, events: CacheEvents, number: int, payload: bytes) -> None:
        if number == self._next:  # else it was replayed already
            events.apply(self.rank, payload)
            self._next += 1

    def _number(self, frame: bytes) -> int:
        number = int.from_bytes(frame[:_NUMBER_BYTES], "big")
        if len(frame) != _NUMBER_BYTES or number > _MAX_NUMBER:
            raise ProtocolError(f"KV events of rank {self.rank}: {frame[:16]!r} is not a sequence number")
        return number

    async def _replay(self, first: int) -> list[tuple[int, bytes]]:
        """All payloads from this number on that the rank still has. Raises RemoteError."""
        import zmq

        dealer = self._context.socket(zmq.DEALER)
        dealer.set_hwm(self._settings.max_unread)
        payloads: list[tuple[int, bytes]] = []
        try:
            dealer.connect(self._endpoints.replay)
            async with asyncio.timeout(self._settings.replay_s):
                await dealer.send_multipart([b"", first.to_bytes(8, "big")])
                while True:
                    frames = await dealer.recv_multipart()
                    if len(frames) != 4:
                        raise ProtocolError(
                            f"KV events of rank {self.rank}: {len(frames)} frames, expected 4"
                        )
                    if frames[2] == _END:
                        return payloads
                    if len(payloads) == self._settings.max_replayed:
                        raise RemoteError(f"vLLM repeated more than {len(payloads)} payloads")
                    payloads.append((self._number(frames[2]), frames[3]))
        except TimeoutError:
            raise RemoteError(
                f"vLLM did not repeat lost KV events within {self._settings.replay_s:g} s"
            ) from None
        finally:
            dealer.close(linger=0)


def free_ports(count: int, host: str = _LOOPBACK) -> int:
    """The first of so many free TCP ports in a row. Whoever is to listen there may still find one taken."""
    while True:
        with socket.socket() as first:
            first.bind((host, 0))
            port: int = first.getsockname()[1]
            try:
                for following in range(port + 1, port + count):
                    with socket.socket() as other:
                        other.bind((host, following))
            except (OSError, OverflowError):
                continue
            return port
