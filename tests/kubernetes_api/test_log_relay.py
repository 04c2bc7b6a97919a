"""The logs of several pods as one, over everything that ends a connection. Times of pauses are virtual."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from penstock.clock import VirtualClock
from penstock.kubernetes.api import ApiError
from penstock.kubernetes.kinds import PODS
from penstock.kubernetes.log_relay import LogRelay, RelaySettings, nanoseconds_of
from tests.discovery.pods import pod, running, tell
from tests.kubernetes_double import KubernetesDouble

NS = "test"
SETTINGS = RelaySettings(tail_lines=2)


class Relayed:
    """A server with pods, and what the relay has written."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.server = KubernetesDouble(self.clock)
        self.written: list[str] = []
        self._second = 0
        self.relay = LogRelay(
            self.server, NS, "penstock.dev/graph=g,role=prefill", self._write, SETTINGS, self.clock
        )

    def _write(self, name: str, line: str) -> None:
        self.written.append(f"{name} {line}")

    async def start_pod(self, name: str, role: str = "prefill") -> None:
        await self.server.create(PODS, pod(NS, name, role, 7000))
        await tell(self.server, NS, name, running("10.0.0.7"))

    def log(self, name: str, *lines: str, time: str = "") -> None:
        for line in lines:
            self._second += 1
            later = f"2026-01-01T00:{self._second // 60:02}:{self._second % 60:02}.5Z"
            self.server.log(NS, name, line, time=time or later)

    async def expect(self, *lines: str, after_s: float = 0.1) -> None:
        """Exactly these were written since the last time."""
        await self.clock.advance(after_s)
        written, self.written = self.written, []
        assert written == list(lines)


@pytest.fixture
async def relayed() -> AsyncIterator[Relayed]:
    """Pod a has written four lines, b none; c has another role. Two lines of a have been shown."""
    relayed = Relayed()
    for name in ("a", "b"):
        await relayed.start_pod(name)
    await relayed.start_pod("c", "decode")
    relayed.log("a", "1", "2", "3", "4")
    relayed.log("c", "not this one's")
    task = asyncio.create_task(relayed.relay.run())
    await relayed.expect("a 3", "a 4", after_s=2)
    yield relayed
    assert not task.done()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_lines_come_as_they_are_written(relayed: Relayed) -> None:
    relayed.log("a", "5")
    relayed.log("c", "not this one's")
    await relayed.expect("a 5")
    relayed.log("b", "1")
    await relayed.expect("b 1")
    relayed.log("a", "", "6")
    await relayed.expect("a ", "a 6")


async def test_a_clock_that_is_set_back(relayed: Relayed) -> None:
    relayed.log("a", "5")
    relayed.log("a", "6", "7", time="2025-06-01T00:00:00Z")
    await relayed.expect("a 5", "a 6", "a 7")
    relayed.server.end_watches()
    relayed.log("a", "8", time="2025-06-01T00:00:01Z")
    await relayed.clock.advance(60)
    assert "a 8" in relayed.written


async def test_a_new_pod_is_shown_from_its_first_line(relayed: Relayed) -> None:
    await relayed.server.create(PODS, pod(NS, "d", "prefill", 7000))
    relayed.log("d", "1", "2", "3", "4")
    await tell(relayed.server, NS, "d", running("10.0.0.8"))
    await relayed.expect("d 1", "d 2", "d 3", "d 4")


async def test_nothing_is_repeated_or_lost_when_connections_break(relayed: Relayed) -> None:
    for number in range(5, 25):
        relayed.server.end_watches()
        relayed.log("a", f"{number}")
        relayed.log("b", f"{number}")
        await relayed.clock.advance(60)
    expected = [f"{name} {number}" for number in range(5, 25) for name in "ab"]
    assert sorted(relayed.written) == sorted(expected)


async def test_lines_of_the_same_time(relayed: Relayed) -> None:
    time = "2026-01-01T01:00:00.123456789Z"
    relayed.log("a", "x", "x", "y", time=time)
    await relayed.expect("a x", "a x", "a y")
    relayed.server.end_watches()
    relayed.log("a", "x", time=time)
    relayed.log("a", "z", time="2026-01-01T01:00:00.12345679Z")
    await relayed.expect("a x", "a z", after_s=60)


async def test_an_outage_of_the_api_server(relayed: Relayed) -> None:
    relayed.server.disconnect()
    await relayed.clock.advance(60)
    relayed.log("a", "5", "6", "7", "8")
    relayed.log("b", "1", "2", "3", "4")  # more than its last lines, though none was shown before
    await relayed.expect(after_s=120)
    relayed.server.connect()
    await relayed.clock.advance(60)
    assert sorted(relayed.written) == [f"a {n}" for n in (5, 6, 7, 8)] + [f"b {n}" for n in (1, 2, 3, 4)]


async def test_a_container_that_is_started_again(relayed: Relayed) -> None:
    relayed.log("a", "last words")
    relayed.server.end_log(NS, "a")
    await relayed.expect("a last words", after_s=40)
    relayed.log("a", "first words")
    await tell(relayed.server, NS, "a", running("10.0.0.7", restarts=1))
    await relayed.expect("a first words")  # at once: its pod said so
    relayed.log("a", "more")
    await relayed.expect("a more")


async def test_a_pod_that_ends(relayed: Relayed) -> None:
    await relayed.server.delete(PODS, "a", NS)
    await relayed.clock.advance(60)
    asked = relayed.server.calls["logs"]
    await relayed.clock.advance(600)
    assert relayed.server.calls["logs"] == asked
    await relayed.start_pod("a")  # another one of that name
    relayed.server.end_log(NS, "a")
    relayed.log("a", "1", "2", "3")
    await relayed.expect("a 1", "a 2", "a 3", after_s=60)


async def test_a_log_that_cannot_be_read_is_asked_for_less_and_less_often(relayed: Relayed) -> None:
    """Its container waits for its image, say."""
    relayed.server.fail_next("logs", ApiError('container "main" is waiting to start', 400), times=1000)
    await relayed.start_pod("d")
    before = relayed.server.calls["logs"]
    await relayed.clock.advance(600)
    assert 10 < relayed.server.calls["logs"] - before < 60


async def test_an_idle_relay_does_nothing(relayed: Relayed) -> None:
    before = dict(relayed.server.calls)
    await relayed.clock.advance(3600)
    after = relayed.server.calls
    assert after["logs"] == before["logs"]
    assert after["watch"] - before["watch"] <= 61


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("1970-01-01T00:00:01Z", 1_000_000_000),
        ("1970-01-01T00:00:01.5Z", 1_500_000_000),
        ("1970-01-01T00:00:01.123456789Z", 1_123_456_789),
        ("1970-01-01T02:00:01.000000001+02:00", 1_000_000_001),
        ("1970-01-01T02:00:01+02:00", 1_000_000_000),
        ("never", 0),
        ("", 0),
    ],
)
def test_a_time_of_a_log_line_is_read_to_the_nanosecond(time: str, expected: int) -> None:
    assert nanoseconds_of(time) == expected
