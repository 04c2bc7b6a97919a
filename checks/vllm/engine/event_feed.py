"""KV events over real sockets, from vLLM's own publisher: nothing is missed, or all is forgotten."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio
from vllm.distributed.kv_events import AllBlocksCleared, BlockStored, KVEventBatch, ZmqEventPublisher

from penstock.core.hashing import root_hash, sequence_hashes
from penstock.engines.vllm.event_feed import EventFeed, EventSources, FeedSettings, remove_dead
from penstock.engines.vllm.kv_events import CacheEvents, Changes
from tests.waiting import until, wait_until

BLOCK_SIZE = 4
WAIT_S = 60.0
PATIENT = FeedSettings(replay_s=WAIT_S, quiet_s=0.5)


def batch(number: int) -> KVEventBatch:
    """The event of one block of its own."""
    stored = BlockStored([number], None, [number] * BLOCK_SIZE, BLOCK_SIZE, None, "GPU", None)
    return KVEventBatch(ts=0.0, events=[stored])


def block(number: int) -> int:
    return sequence_hashes([number] * BLOCK_SIZE, BLOCK_SIZE, root_hash("m"))[0]


def payload(number: int) -> bytes:
    return msgspec.msgpack.encode(batch(number))


class Follower:
    """A feed, and the set of blocks that it has told of."""

    def __init__(self, sources: EventSources, settings: FeedSettings) -> None:
        self.cached: set[int] = set()
        self.reports = 0
        self.feed = EventFeed(CacheEvents("m", BLOCK_SIZE, 100_000), sources, self._on_changes, settings)

    def _on_changes(self, changes: Changes) -> None:
        self.reports += 1
        assert self.cached.isdisjoint(changes.stored)
        assert self.cached.issuperset(changes.removed)
        self.cached = (self.cached - set(changes.removed)) | set(changes.stored)

    async def until(self, *numbers: int) -> None:
        """Wait until exactly these blocks are cached."""
        await until(lambda: self.cached == {block(number) for number in numbers})


@asynccontextmanager
async def following(sources: EventSources, settings: FeedSettings = PATIENT) -> AsyncIterator[Follower]:
    follower = Follower(sources, settings)
    await follower.feed.start()
    try:
        yield follower
    finally:
        await follower.feed.close()


@pytest.fixture
def sources() -> EventSources:
    return EventSources(1)


@asynccontextmanager
async def publishing(
    sources: EventSources, rank: int = 0, **limits: Any
) -> AsyncIterator[ZmqEventPublisher]:
    base = sources.ranks[0]
    publisher = ZmqEventPublisher(rank, endpoint=base.publish, replay_endpoint=base.replay, **limits)
    try:
        yield publisher
    finally:
        await asyncio.to_thread(publisher.shutdown)


def until_sent(publisher: ZmqEventPublisher) -> None:
    """Wait until its thread has taken all that was published, while the event loop stands still."""
    wait_until(lambda: not publisher._event_queue.qsize(), "it sends them", look_s=0.001)


@pytest.fixture(autouse=True, scope="module")
def _publisher_s_context() -> Iterator[None]:
    """vLLM's publisher leaves its process's context to the end of the process."""
    yield
    gc.collect()
    zmq.Context.instance().destroy(linger=0)


# --- vLLM's publisher -----------------------------------------------------------------------------------


async def test_what_was_published_before_and_after(sources: EventSources) -> None:
    async with publishing(sources) as publisher:
        publisher.publish(batch(1))
        publisher.publish(batch(2))
        async with following(sources) as follower:
            await follower.until(1, 2)  # its thread may publish the second after the replay
            publisher.publish(batch(3))
            await follower.until(1, 2, 3)
            publisher.publish(KVEventBatch(ts=0.0, events=[AllBlocksCleared()]))
            publisher.publish(batch(4))
            await follower.until(4)


async def test_a_burst_is_taken_in_batches(sources: EventSources) -> None:
    async with publishing(sources) as publisher, following(sources) as follower:
        for number in range(3000):
            publisher.publish(batch(number))
        until_sent(publisher)
        await follower.until(*range(3000))
        assert follower.reports < 1500


async def test_what_the_socket_dropped_is_replayed(sources: EventSources) -> None:
    """The subscription holds 8 payloads, and the event loop does not read for a while."""
    settings = msgspec.structs.replace(PATIENT, max_unread=8)
    async with publishing(sources, hwm=8) as publisher, following(sources, settings) as follower:
        for number in range(200):
            publisher.publish(batch(number))
        until_sent(publisher)
        publisher.publish(batch(200))
        await until(lambda: block(200) in follower.cached)
        # A replay goes through limited buffers too: what did not fit costs what was before it.
        missing = [number for number in range(201) if block(number) not in follower.cached]
        assert missing == list(range(len(missing)))


async def test_what_was_published_too_long_ago_is_forgotten(
    sources: EventSources, caplog: pytest.LogCaptureFixture
) -> None:
    settings = msgspec.structs.replace(PATIENT, max_unread=8)
    async with (
        publishing(sources, buffer_steps=4, hwm=8) as publisher,
        following(sources, settings) as follower,
    ):
        publisher.publish(batch(1000))
        await follower.until(1000)
        for number in range(200):
            publisher.publish(batch(number))
        until_sent(publisher)
        publisher.publish(batch(200))
        await until(lambda: block(200) in follower.cached)
        assert block(1000) not in follower.cached
        assert "forgetting its cache" in caplog.text


async def test_a_publisher_that_began_anew_is_followed_by_a_feed_of_its_own(sources: EventSources) -> None:
    async with publishing(sources) as publisher:
        publisher.publish(batch(1))
        async with following(sources) as follower:
            await follower.until(1)
    again = EventSources(1)
    async with publishing(again) as publisher, following(again) as follower:
        publisher.publish(batch(2))
        await follower.until(2)


async def test_ranks_are_followed_by_their_ports() -> None:
    sources = EventSources(2)
    async with (
        publishing(sources, 0) as first,
        publishing(sources, 1) as second,
        following(sources, FeedSettings()) as follower,
    ):
        first.publish(batch(1))
        second.publish(batch(1))
        second.publish(batch(2))
        await follower.until(1, 2)
        first.publish(KVEventBatch(ts=0.0, events=[AllBlocksCleared()]))
        second.publish(batch(3))
        await follower.until(1, 2, 3)
        second.publish(KVEventBatch(ts=0.0, events=[AllBlocksCleared()]))
        await follower.until()


# --- publishers that are not vLLM's ---------------------------------------------------------------------


class Odd:
    """Publishes what it is told to, and answers the next replay requests with what it is told to.

    Args:
        answers: the first is to the start. None: no answer. Beyond them: that there is nothing.
    """

    def __init__(
        self, sources: EventSources, answers: Sequence[list[tuple[int, bytes]] | None] = ()
    ) -> None:
        self._context = zmq.asyncio.Context()
        self._pub = self._context.socket(zmq.XPUB)
        self._pub.bind(sources.ranks[0].publish)
        self._router = self._context.socket(zmq.ROUTER)
        self._router.bind(sources.ranks[0].replay)
        self.answers = list(answers)
        self.asked: list[int] = []  # the first payload that each request was for
        self._serving = asyncio.create_task(self._serve())

    async def subscribed(self) -> None:
        await asyncio.wait_for(self._pub.recv(), WAIT_S)

    async def publish(self, number: int, data: bytes | None = None) -> None:
        await self._pub.send_multipart([b"", number.to_bytes(8, "big"), data or payload(number)])

    async def send(self, *frames: bytes) -> None:
        await self._pub.send_multipart(frames)

    async def _serve(self) -> None:
        while True:
            client, _, first = await self._router.recv_multipart()
            self.asked.append(int.from_bytes(first, "big"))
            answer = self.answers.pop(0) if self.answers else []
            if answer is None:
                continue
            for number, data in answer:
                await self._router.send_multipart([client, b"", b"", number.to_bytes(8, "big"), data])
            await self._router.send_multipart([client, b"", b"", b"\xff" * 8, b""])

    async def close(self) -> None:
        self._serving.cancel()
        await asyncio.gather(self._serving, return_exceptions=True)
        self._context.destroy(linger=0)


@asynccontextmanager
async def odd(
    answers: Sequence[list[tuple[int, bytes]] | None] = (), **limits: float
) -> AsyncIterator[tuple[Odd, Follower]]:
    """One that is followed by a feed which asks for nothing by itself, unless `limits` say otherwise."""
    sources = EventSources(1)
    publisher = Odd(sources, answers)
    settings = msgspec.structs.replace(PATIENT, **{"quiet_s": WAIT_S, **limits})
    try:
        async with following(sources, settings) as follower:
            await publisher.subscribed()
            yield publisher, follower
    finally:
        await publisher.close()


def numbered(*numbers: int) -> list[tuple[int, bytes]]:
    return [(number, payload(number)) for number in numbers]


async def test_a_gap_is_filled_once_and_what_comes_twice_is_taken_once() -> None:
    async with odd() as (publisher, follower):
        await publisher.publish(0)
        await follower.until(0)
        publisher.answers = [numbered(1, 2, 3, 4, 5)]
        await publisher.publish(3)
        await publisher.publish(4)
        await publisher.publish(5)
        await publisher.publish(6)
        await follower.until(0, 1, 2, 3, 4, 5, 6)
        assert publisher.asked == [0, 1]


async def test_a_last_payload_that_got_lost_is_asked_for_when_it_is_quiet() -> None:
    async with odd([[], numbered(0, 1)], quiet_s=0.2) as (publisher, follower):
        await follower.until(0, 1)
        await publisher.publish(2)
        await follower.until(0, 1, 2)
        await until(lambda: publisher.asked == [0, 0, 3])


@pytest.mark.parametrize(
    ("answer", "left"),
    [
        (numbered(2, 3, 4), (2, 3, 4, 5)),  # 1 is lost, and with it what was before
        (numbered(1, 2, 4), (4, 5)),  # a hole in the replay
        (numbered(1, 2), (5,)),  # its end is missing
        ([], (5,)),
        (None, (5,)),  # no answer at all
    ],
)
async def test_what_cannot_be_had_any_more_costs_what_was_known(
    answer: list[tuple[int, bytes]] | None, left: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    limits = {"replay_s": 1.0} if answer is None else {}
    async with odd(**limits) as (publisher, follower):
        await publisher.publish(0)
        await follower.until(0)
        publisher.answers = [answer]
        await publisher.publish(5)
        await follower.until(*left)
        await publisher.publish(6)
        await follower.until(*left, 6)
        assert "forgetting its cache" in caplog.text


@pytest.mark.parametrize(
    "frames",
    [
        [b"", (1).to_bytes(8, "big"), b"garbage"],
        [b"", (1).to_bytes(8, "big"), msgspec.msgpack.encode([0.0, [{"type": "Other"}]])],
        [b"one frame"],
        [b"", b"", b"", b""],
    ],
)
async def test_what_is_not_understood_drops_the_hints_loudly(
    frames: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    async with odd() as (publisher, follower):
        await publisher.publish(0)
        await follower.until(0)
        await publisher.send(*frames)
        await follower.until()
        assert "no longer knows what rank 0 has cached" in caplog.text
        await publisher.publish(2)  # nobody listens any more, and nothing breaks
        await asyncio.sleep(0.1)
        assert not follower.cached


async def test_a_rank_that_is_not_understood_costs_only_its_own_hints() -> None:
    sources = EventSources(2)
    async with (
        publishing(sources, 0) as first,
        publishing(sources, 1) as second,
        following(sources, FeedSettings()) as follower,
    ):
        first.publish(batch(1))
        second.publish(batch(2))
        await follower.until(1, 2)
        wrong = BlockStored([3], None, [3], BLOCK_SIZE, None, "GPU", None)
        second.publish(KVEventBatch(ts=0.0, events=[wrong]))
        await follower.until(1)
        first.publish(batch(4))
        await follower.until(1, 4)


async def test_an_end_before_the_first_answer_leaves_nothing(sources: EventSources) -> None:
    """Nobody publishes: the feed starts without, after its deadline."""
    assert sources.directory is not None
    async with following(sources, FeedSettings(replay_s=1.0)):
        assert sources.directory.exists()
    assert not sources.directory.exists()


def test_the_sockets_are_this_user_s_alone(sources: EventSources) -> None:
    assert sources.directory is not None
    assert sources.directory.stat().st_mode & 0o077 == 0
    sources.close()
    sources.close()
    assert not sources.directory.exists()


def test_sources_that_nobody_closes_leave_no_directory() -> None:
    sources = EventSources(1)
    directory = sources.directory
    assert directory is not None
    del sources
    gc.collect()
    assert not directory.exists()


def test_what_is_left_of_killed_engines_is_removed_by_later_ones(tmp_path: Path) -> None:
    live, dead, new = (tmp_path / f"penstock-vllm-{name}" for name in ("live", "dead", "new"))
    long_ago = time.time() - 3600
    with contextlib.ExitStack() as around:
        for directory in (live, dead, new):
            directory.mkdir()
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(directory / "events"))
            if directory is live:
                listener.listen()
                around.callback(listener.close)
            else:
                listener.close()
            if directory is not new:
                os.utime(directory / "events", (long_ago, long_ago))
        remove_dead(tmp_path)
    assert [directory.exists() for directory in (live, dead, new)] == [True, False, True]
