"""A logger that limits how often each message is written, so that strangers cannot fill the log."""

from __future__ import annotations

import logging
from typing import Final

from penstock.clock import Clock, MonotonicClock

BURST_LINES: Final = 10
PERIOD_S: Final = 60.0


class QuietLog(logging.Logger):
    """A logger that passes at most 10 lines a minute of each message (without its arguments) to another
    logger, and then logs how many it left out."""

    def __init__(self, logger: logging.Logger, clock: Clock | None = None) -> None:
        super().__init__(logger.name)
        self.parent = logger
        self._logger = logger
        self._clock = clock or MonotonicClock()
        self._period_start_s = self._clock.now()
        self._lines: dict[str, int] = {}  # in this period, by message

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 - logging's name
        """Whether the other logger is enabled for this level."""
        return self._logger.isEnabledFor(level)

    def handle(self, record: logging.LogRecord) -> None:
        """Pass a record on, unless its message was logged too often. All logging methods call this."""
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
