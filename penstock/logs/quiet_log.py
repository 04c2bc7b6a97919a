"""A log that strangers cannot fill."""

from __future__ import annotations

import logging
from typing import Final

from penstock.clock import Clock, MonotonicClock

BURST_LINES: Final = 10
PERIOD_S: Final = 60.0


class QuietLog(logging.Logger):
    """Another logger, with at most 10 lines a minute for each message (without its arguments); then it says
    how many were left out."""

    def __init__(self, logger: logging.Logger, clock: Clock | None = None) -> None:
        super().__init__(logger.name)
        self.parent = logger
        self._logger = logger
        self._clock = clock or MonotonicClock()
        self._period_start_s = self._clock.now()
        self._lines: dict[str, int] = {}  # in this period, by message

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 - logging's name
        """As the other logger says."""
        return self._logger.isEnabledFor(level)

    def handle(self, record: logging.LogRecord) -> None:
        """What each logging call comes to."""
        now = self._clock.now()
        if now - self._period_start_s >= PERIOD_S:
            left_out = sum(max(0, lines - BURST_LINES) for lines in self._lines.values())
            self._period_start_s = now
            self._lines.clear()
            if left_out:
                self._logger.log(record.levelno, "%d more lines like these were left out", left_out)
        message = str(record.msg)
        self._lines[message] = self._lines.get(message, 0) + 1
        if self._lines[message] <= BURST_LINES:
            super().handle(record)
