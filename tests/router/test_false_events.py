"""Cache events that are missing or wrong are named within a minute of load, nothing is refused meanwhile,
and what they say counts again once it is right: whole graphs on virtual time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any

import pytest

from penstock.core.overlap_check import Cause
from tests.virtual_cluster import Asked, Frontend, VirtualCluster, refused

MINUTE_S = 60.0
WARM_UP_S = 20.0


class Chats:
    """Sessions whose every turn has all before it as its prompt's beginning."""

    def __init__(self, cluster: VirtualCluster, frontend: Frontend, sessions: int = 30) -> None:
        self._sessions = sessions
        self.asked: list[Asked] = []
        self._cluster = cluster
        self._frontend = frontend
        self._rng = Random(7)

    async def during(self, story: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Let all chat while something happens."""
        chats = [asyncio.create_task(self._chat()) for _ in range(self._sessions)]
        await story()
        for chat in chats:
            chat.cancel()
        await asyncio.gather(*chats, return_exceptions=True)
        await self._frontend.idle()

    def cached_share(self, since: float, until: float) -> float:
        """Of the prompt tokens of requests that came then."""
        asked = [it for it in self.asked if since <= it.at < until]
        return sum(it.cached_tokens for it in asked) / sum(len(it.prompt) for it in asked)

    async def _chat(self) -> None:
        text: list[int] = []
        while True:
            await asyncio.sleep(self._rng.uniform(1.0, 3.0))
            asked = self._frontend.ask(self._rng.randint(100, 400), 20, after=text)
            self.asked.append(asked)
            while not asked.ended and not asked.refused:
                await asyncio.sleep(0.05)
            text = [] if len(asked.prompt) > 4000 else [*asked.prompt, *asked.output]


async def until_cause(
    cluster: VirtualCluster, frontend: Frontend, worker: str, *causes: Cause | None
) -> float:
    """How many seconds it took until the frontend saw one of these."""
    began = cluster.loop.time()
    while frontend.router.placement.overlap_check.cause(worker) not in causes:
        assert cluster.loop.time() < began + MINUTE_S, (worker, causes)
        await asyncio.sleep(0.1)
    return cluster.loop.time() - began


@pytest.mark.parametrize(
    ("fault", "causes", "total_blocks"),
    [
        ("off", [Cause.EVENTS_OFF], 16_384),
        ("other-hashes", [Cause.HASH_MISMATCH], 16_384),
        ("lost", [Cause.EVENTS_LOST], 16_384),
        ("unseen-evictions", [Cause.UNSEEN_EVICTIONS], 2000),
    ],
)
def test_false_cache_events_are_named_within_a_minute_and_believed_again_when_they_are_right(
    fault: str, causes: list[Cause], total_blocks: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "penstock.router")
    cluster = VirtualCluster(3, total_blocks=total_blocks)
    frontend = cluster.frontend()
    chats = Chats(cluster, frontend)
    shares: list[float] = []

    async def story() -> None:
        await asyncio.sleep(WARM_UP_S)
        before = cluster.loop.time()
        cluster.engines["w1"].fault = fault
        await until_cause(cluster, frontend, "w1", *causes)
        named = cluster.loop.time()
        await asyncio.sleep(MINUTE_S)
        cluster.engines["w1"].fault = ""
        await until_cause(cluster, frontend, "w1", None)
        shares.extend([chats.cached_share(1.0, before), chats.cached_share(named, cluster.loop.time())])

    cluster.run(lambda: chats.during(story))
    assert not refused(chats.asked)
    lines = [it.getMessage() for it in caplog.records if "kv overlap check" in it.getMessage()]
    assert lines[0].startswith(f"kv overlap check: w1: distrusted, {causes[0]}: "), lines
    assert lines[-1].startswith("kv overlap check: w1: trusted again"), lines
    assert all("w1" in line for line in lines), "of the others nothing was wrong"
    assert shares[1] > 0.9 * shares[0], shares


def test_events_off_on_one_worker_and_another_block_size_on_another_are_named_apart(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "penstock.router")
    cluster = VirtualCluster(4)
    frontend = cluster.frontend()
    chats = Chats(cluster, frontend, sessions=90)

    async def story() -> None:
        await asyncio.sleep(WARM_UP_S)
        cluster.engines["w1"].fault = "off"
        await cluster.stop("w2")
        cluster.start("w2", block_size=32, claimed_block_size=16)
        await until_cause(cluster, frontend, "w1", Cause.EVENTS_OFF)
        await until_cause(cluster, frontend, "w2", Cause.BLOCK_SIZE)
        await asyncio.sleep(20.0)
        cluster.engines["w1"].fault = ""
        await cluster.stop("w2")
        cluster.start("w2")
        await until_cause(cluster, frontend, "w1", None)
        await asyncio.sleep(MINUTE_S - 40.0)
        assert frontend.router.placement.overlap_check.healthy("w2")

    cluster.run(lambda: chats.during(story))
    assert not refused(chats.asked)
    assert not frontend.router.placement.overlap_check.causes
    lines = [it.getMessage() for it in caplog.records if "kv overlap check" in it.getMessage()]
    assert any("w2: distrusted, block_size: " in line and ": 32 tokens" in line for line in lines), lines
    assert {line.split(": ")[1] for line in lines} == {"w1", "w2"}


def test_a_worker_with_another_block_size_is_named_and_not_distrusted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cluster = VirtualCluster(1)
    cluster.start("w1", block_size=32)
    frontend = cluster.frontend()
    chats = Chats(cluster, frontend, sessions=60)
    cluster.run(lambda: chats.during(lambda: asyncio.sleep(5.0)))
    line = "has blocks of 32 tokens, others of model sim have 16"
    other = "has blocks of 16 tokens, others of model sim have 32"
    assert f"instance w1 {line}" in caplog.text or f"instance w0 {other}" in caplog.text
    assert not refused(chats.asked)
    assert not frontend.router.placement.overlap_check.causes
