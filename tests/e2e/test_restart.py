"""A lone frontend is restarted, or dies, under load: its port refuses nobody."""

from __future__ import annotations

import asyncio
import collections
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import ANSWER_S, MODEL, ROOT, Graph, running
from tests.waiting import until

REQUEST = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "My name is Alice. What is my name?"}],
    "max_tokens": 20,
    "temperature": 0,
    "stream": True,
}
ANSWERED = "answered"
WITHIN_S = 180.0


@pytest.fixture
def graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Graph]:
    monkeypatch.setenv("PENSTOCK_LOG", "debug")  # much is logged
    with running(ROOT / "deploy" / "local.yaml", tmp_path / "state", instances=4) as graph:
        yield graph


class Load:
    """Streams at a steady rate, half of them on connections of their own, half on kept ones; none is sent
    twice."""

    def __init__(self, url: str, rate: float) -> None:
        self.ends: collections.Counter[str] = collections.Counter()
        self.longest_s = 0.0
        self._url = f"{url}/v1/chat/completions"
        self._rate = rate

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        stop = asyncio.Event()
        sending = asyncio.create_task(self._send_until(stop))
        try:
            yield
        finally:
            stop.set()
            await sending

    async def _send_until(self, stop: asyncio.Event) -> None:
        async with (
            httpx.AsyncClient(timeout=2 * ANSWER_S, trust_env=False) as kept,
            asyncio.TaskGroup() as tasks,
        ):
            number = 0
            while not stop.is_set():
                number += 1
                tasks.create_task(self._ask(kept if number % 2 else None))
                await asyncio.sleep(1 / self._rate)

    async def _ask(self, kept: httpx.AsyncClient | None) -> None:
        began = time.monotonic()
        if kept is not None:
            end = await self._stream(kept)
        else:
            async with httpx.AsyncClient(timeout=2 * ANSWER_S, trust_env=False) as own:
                end = await self._stream(own)
        self.ends[end] += 1
        self.longest_s = max(self.longest_s, time.monotonic() - began)

    async def _stream(self, client: httpx.AsyncClient) -> str:
        """How it ended."""
        try:
            async with client.stream("POST", self._url, json=REQUEST) as response:
                body = await response.aread()
        except httpx.HTTPError as error:  # whatever a client can see is the finding
            return repr(error)
        if response.status_code != 200:
            return f"{response.status_code} {body.decode()}"
        return ANSWERED if body.endswith(b"data: [DONE]\n\n") else "cut"

    async def more(self, count: int) -> None:
        """Wait for so many further ends."""
        target = self.ends.total() + count
        await until(lambda: self.ends.total() >= target, lambda: str(self.ends), WITHIN_S, look_s=0.05)


def frontend(graph: Graph) -> dict:
    [found] = graph.replicas("Frontend")
    return found


async def test_a_lone_frontend_is_restarted_and_loses_nothing(graph: Graph) -> None:
    before = frontend(graph)
    load = Load(graph.url, rate=10)
    async with load.running():
        await load.more(20)
        for _ in range(2):
            result = await asyncio.to_thread(graph.command, "restart", "Frontend", timeout_s=300)
            assert result.returncode == 0, result.stderr
            await load.more(20)
    assert set(load.ends) == {ANSWERED}
    after = frontend(graph)
    assert after["pid"] != before["pid"]
    assert after["address"] == before["address"]


async def test_a_lone_frontend_that_dies_refuses_nobody(graph: Graph) -> None:
    """What it had accepted is gone with it; what comes then waits for the next one."""

    def is_restarted() -> bool:
        found = frontend(graph)
        return (found["state"], found["restarts"]) == ("ready", 1)

    load = Load(graph.url, rate=10)
    async with load.running():
        await load.more(20)
        os.kill(frontend(graph)["pid"], signal.SIGKILL)
        await until(partial(asyncio.to_thread, is_restarted), within_s=WITHIN_S, look_s=0.1)
        await load.more(20)
    unanswered = [end for end in load.ends if end != ANSWERED]
    assert all(end.startswith(("RemoteProtocolError", "ReadError")) for end in unanswered), load.ends


async def test_a_stopped_launcher_stops_nobody(graph: Graph) -> None:
    """What it started goes on, though nobody reads its logs."""
    load = Load(graph.url, rate=20)
    async with load.running():
        graph.process.send_signal(signal.SIGSTOP)
        try:
            await load.more(250)
        finally:
            graph.process.send_signal(signal.SIGCONT)
        await load.more(10)
        await until(lambda: "lines_lost=" in graph.console_text(), within_s=WITHIN_S)
    assert set(load.ends) == {ANSWERED}
