"""A log that strangers cannot fill."""

from __future__ import annotations

import logging

from penstock.clock import Clock

_BURST_LINES = 10
_PERIOD_S = 60.0


class QuietLog:
    """Writes at most 10 warnings a minute, then says how many it left out."""

    def __init__(self, logger: logging.Logger, clock: Clock) -> None:
        self._logger = logger
        self._clock = clock
        self._period_start_s = clock.now()
        self._lines = 0

    def warning(self, message: str, *args: object) -> None:
        """As `logging.Logger.warning`."""
        now = self._clock.now()
        if now - self._period_start_s >= _PERIOD_S:
            left_out = self._lines - _BURST_LINES
            if left_out > 0:
                self._logger.warning("%d more lines like these were left out", left_out)
            self._period_start_s = now
            self._lines = 0
        self._lines += 1
        if self._lines <= _BURST_LINES:
            self._logger.warning(message, *args)
