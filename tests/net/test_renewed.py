"""Files that are renewed under a running process."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import penstock.net.renewed
from penstock.clock import VirtualClock
from penstock.detached import start_thread
from penstock.errors import ConfigError
from penstock.net.renewed import RECHECK_S, Renewed


class Reading:
    """Counts what it is asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reads = 0

    def __call__(self) -> int:
        self.reads += 1
        try:
            return int(self.path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"no number: {error}") from None


@pytest.fixture
def reading(tmp_path: Path) -> Reading:
    path = tmp_path / "file"
    path.write_text("1")
    return Reading(path)


async def test_a_change_counts_after_the_pause(reading: Reading, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = VirtualClock()
    renewed = Renewed("number", [reading.path], reading, clock)
    reading.path.write_text("22")
    assert renewed.get() == 1
    await clock.advance(RECHECK_S)
    assert [renewed.get() for _ in range(3)] == [22] * 3
    assert reading.reads == 2
    assert caplog.messages == ["number: read again"]


async def test_what_has_not_changed_is_not_read(reading: Reading) -> None:
    clock = VirtualClock()
    renewed = Renewed("number", [reading.path], reading, clock)
    for _ in range(10):
        await clock.advance(RECHECK_S)
        assert renewed.get() == 1
    assert reading.reads == 1


async def test_another_file_of_the_same_time_and_size(reading: Reading) -> None:
    """As when it is moved into place, or a link to it turned."""
    clock = VirtualClock()
    renewed = Renewed("number", [reading.path], reading, clock)
    other = reading.path.with_name("other")
    other.write_text("2")
    found = reading.path.stat()
    os.utime(other, ns=(found.st_atime_ns, found.st_mtime_ns))
    os.replace(other, reading.path)
    await clock.advance(RECHECK_S)
    assert renewed.get() == 2


async def test_what_cannot_be_used_changes_nothing_and_is_said_once(
    reading: Reading, caplog: pytest.LogCaptureFixture
) -> None:
    clock = VirtualClock()
    renewed = Renewed("number", [reading.path], reading, clock)
    spoilers: list[Callable[[], object]] = [lambda: reading.path.write_text("x"), reading.path.unlink]
    for spoil in spoilers:
        caplog.clear()
        spoil()
        for _ in range(3):
            await clock.advance(RECHECK_S)
            assert renewed.get() == 1
        (record,) = caplog.records
        assert record.levelname == "ERROR"
        assert record.getMessage().startswith("number: the value read before stays in use: no number: ")
    reading.path.write_text("3")
    await clock.advance(RECHECK_S)
    assert renewed.get() == 3


def test_the_first_time_it_must_be_usable(reading: Reading) -> None:
    reading.path.write_text("x")
    with pytest.raises(ConfigError, match="no number"):
        Renewed("number", [reading.path], reading)


async def test_a_folder_that_does_not_answer_holds_up_nobody(
    reading: Reading, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(penstock.net.renewed, "start_thread", start_thread)
    clock = VirtualClock()
    renewed = Renewed("number", [reading.path], reading, clock)
    answers, looks = threading.Event(), 0
    stamp = penstock.net.renewed._stamp

    def hang(path: Path) -> object:
        nonlocal looks
        looks += 1
        assert answers.wait(30)
        return stamp(path)

    reading.path.write_text("22")
    monkeypatch.setattr(penstock.net.renewed, "_stamp", hang)
    for _ in range(10):
        await clock.advance(RECHECK_S)
        assert renewed.get() == 1
    assert looks == 1, "another look hangs beside the first"
    assert caplog.messages == ["number: the value read before stays in use: no answer in 3 s"]
    answers.set()
    async with asyncio.timeout(20):
        while renewed.get() == 1:
            await asyncio.sleep(0.01)
    assert renewed.get() == 22
