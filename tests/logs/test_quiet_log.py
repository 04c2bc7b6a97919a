from __future__ import annotations

import logging

import pytest

from penstock.clock import VirtualClock
from penstock.logs.quiet_log import QuietLog


async def test_ten_lines_a_minute_and_a_count(caplog: pytest.LogCaptureFixture) -> None:
    clock = VirtualClock()
    log = QuietLog(logging.getLogger("test"), clock)
    for number in range(25):
        log.warning("line %d", number)
    assert [record.getMessage() for record in caplog.records] == [f"line {number}" for number in range(10)]
    caplog.clear()
    await clock.advance(60)
    log.warning("again")
    log.warning("and again")
    assert [record.getMessage() for record in caplog.records] == [
        "15 more lines like these were left out",
        "again",
        "and again",
    ]
