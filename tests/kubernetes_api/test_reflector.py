"""Following an API server that is slow, forgetful or away. Times are virtual."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import pytest

from penstock.clock import VirtualClock
from penstock.kubernetes.api import ApiError, Object, name_of
from penstock.kubernetes.kinds import CONFIG_MAPS
from penstock.kubernetes.reflector import Reflector, ReflectorSettings
from tests.kubernetes_contract import config
from tests.kubernetes_double import CALL_S, KubernetesDouble

SETTINGS = ReflectorSettings(watch_s=60, retry_min_s=0.2, retry_max_s=10.0)
NS = "test"


class Followed:
    """A server, a reflector, and what that reported."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.server = KubernetesDouble(self.clock)
        self.told: list[str] = []
        self.reflector = Reflector(
            self.server,
            CONFIG_MAPS,
            NS,
            "l=1",
            on_change=self._on_change,
            on_synced=lambda: self.told.append("synced"),
            settings=SETTINGS,
            clock=self.clock,
        )

    def _on_change(self, before: Object | None, after: Object | None) -> None:
        told = "+" if before is None else "-" if after is None else "~"
        self.told.append(told + name_of(after or before or {}))

    async def put(self, *names: str) -> None:
        for name in names:
            await self.server.create(CONFIG_MAPS, config(NS, name, labels={"l": "1"}))

    async def touch(self, name: str, value: str) -> None:
        await self.server.patch(CONFIG_MAPS, name, {"data": {"x": value}}, NS)

    def names(self) -> set[str]:
        return {name_of(item) for item in self.reflector}

    def calls(self, verb: str) -> int:
        return self.server.calls.get(verb, 0)

    def take_told(self) -> list[str]:
        told, self.told = self.told, []
        return told


@pytest.fixture
async def followed() -> AsyncIterator[Followed]:
    """With objects a and b, and the reflector running."""
    followed = Followed()
    await followed.put("a", "b")
    running = asyncio.create_task(followed.reflector.run())
    await followed.clock.advance(1)
    assert followed.take_told() == ["+a", "+b", "synced"]
    yield followed
    assert not running.done()
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def test_changes_are_followed(followed: Followed) -> None:
    await followed.put("c")
    await followed.touch("a", "1")
    await followed.server.delete(CONFIG_MAPS, "b", NS)
    await followed.clock.advance(1)
    assert followed.take_told() == ["+c", "~a", "-b"]
    assert followed.names() == {"a", "c"}
    assert followed.reflector.get(NS, "a")["data"] == {"x": "1"}
    assert followed.reflector.get(NS, "b") is None
    assert (followed.reflector.synced, followed.reflector.trouble) == (True, "")


async def test_watches_go_on_where_they_ended(followed: Followed) -> None:
    """An hour is one list, and a watch for each `watch_s`."""
    for minute in range(60):
        await followed.clock.advance(60)
        if minute == 30:
            await followed.touch("a", "1")
    assert followed.take_told() == ["~a"]
    assert followed.calls("list") == 1
    assert 55 <= followed.calls("watch") <= 65


async def test_a_bookmark_saves_the_list_when_changes_are_forgotten(followed: Followed) -> None:
    """Of other objects there are many changes, and the server forgets them all."""
    await followed.server.create(CONFIG_MAPS, config("elsewhere", "x"))
    await followed.clock.advance(61)  # the watch ends with a bookmark, which is later than that
    followed.server.compact()
    await followed.clock.advance(120)
    assert followed.calls("list") == 1


async def test_forgotten_changes_are_found_by_a_list(followed: Followed) -> None:
    followed.server.disconnect()
    await followed.clock.advance(5)
    followed.server.remove(CONFIG_MAPS, "b", NS)
    followed.server.connect()
    await followed.touch("a", "1")
    await followed.put("c")
    followed.server.compact()
    await followed.clock.advance(20)
    assert followed.take_told() == ["-b", "~a", "+c", "synced"]


async def test_an_object_that_was_made_again_is_another_one(followed: Followed) -> None:
    followed.server.disconnect()
    await followed.clock.advance(5)
    followed.server.remove(CONFIG_MAPS, "b", NS)
    followed.server.connect()
    await followed.put("b")
    followed.server.compact()
    await followed.clock.advance(20)
    assert followed.take_told() == ["-b", "+b", "synced"]


async def test_objects_are_found_by_what_they_are_indexed_by() -> None:
    server, clock = KubernetesDouble(VirtualClock()), VirtualClock()
    reflector = Reflector(
        server, CONFIG_MAPS, index=lambda item: item.get("data", {}).get("x", ""), clock=clock
    )
    await server.create(CONFIG_MAPS, config(NS, "a", data={"x": "1"}))
    await server.create(CONFIG_MAPS, config(NS, "b", data={"x": "1"}))
    running = asyncio.create_task(reflector.run())
    await clock.advance(1)
    assert [name_of(item) for item in reflector.found("1")] == ["a", "b"]
    await server.patch(CONFIG_MAPS, "a", {"data": {"x": "2"}}, NS)
    await server.delete(CONFIG_MAPS, "b", NS)
    await clock.advance(1)
    assert reflector.found("1") == []
    assert [name_of(item) for item in reflector.found("2")] == ["a"]
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def test_what_has_not_changed_is_not_reported_by_a_list(followed: Followed) -> None:
    followed.server.end_watches()
    await followed.clock.advance(5)
    assert followed.calls("list") == 2
    assert followed.take_told() == ["synced"]


async def test_an_outage(followed: Followed, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "penstock")
    followed.server.disconnect("connection refused")
    await followed.clock.advance(180)
    assert followed.names() == {"a", "b"}
    assert "connection refused" in followed.reflector.trouble
    assert 15 <= followed.calls("list") <= 60  # less and less often, up to `retry_max_s`
    followed.server.connect()
    await followed.clock.advance(SETTINGS.retry_max_s)
    assert followed.reflector.trouble == ""
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "the last known objects stay" in warnings[0].getMessage()
    assert "answers again: outage_s=1" in caplog.text
    await followed.put("c")
    await followed.clock.advance(1)
    assert followed.names() == {"a", "b", "c"}


async def test_a_frozen_server_is_noticed(followed: Followed) -> None:
    """Its connections stay open, and nothing comes."""
    followed.server.freeze()
    followed.server.remove(CONFIG_MAPS, "b", NS)
    await followed.clock.advance(SETTINGS.watch_s + 30 + CALL_S + 5)
    assert "no answer" in followed.reflector.trouble
    assert followed.names() == {"a", "b"}
    followed.server.thaw()
    await followed.clock.advance(CALL_S + SETTINGS.retry_max_s)
    assert followed.reflector.trouble == ""
    assert followed.names() == {"a"}


async def test_a_broken_watch_is_no_outage(followed: Followed, caplog: pytest.LogCaptureFixture) -> None:
    followed.server.end_watches()
    await followed.clock.advance(5)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    await followed.put("c")
    await followed.clock.advance(1)
    assert followed.names() == {"a", "b", "c"}


@pytest.mark.parametrize("status", [403, 410, 500])
async def test_watches_that_never_work_are_tried_less_and_less_often(
    followed: Followed, status: int
) -> None:
    followed.server.fail_next("watch", ApiError("no", status), times=1000)
    followed.server.end_watches()
    await followed.clock.advance(600)
    assert followed.calls("list") < 150
    await followed.put("c")
    await followed.clock.advance(SETTINGS.retry_max_s)
    assert followed.names() == {"a", "b", "c"}  # lists alone do, too


async def test_a_server_that_is_away_at_first() -> None:
    followed = Followed()
    followed.server.disconnect("connection refused")
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(followed.reflector.run())
        await followed.clock.advance(30)
        assert not followed.reflector.synced
        assert "connection refused" in followed.reflector.trouble
        followed.server.connect()
        await followed.clock.advance(SETTINGS.retry_max_s)
        assert followed.reflector.synced
        assert followed.take_told() == ["synced"]
        running.cancel()
