"""Logs an outage of discovery: one line with the reason when it begins, one line when it ends."""

from __future__ import annotations

import logging
import time


class Outage:
    """The state of something that may become unavailable and available again.

    Args:
        log: where the lines are written.
        subject: what may be unavailable; the beginning of each line.
        meanwhile: what happens during an outage.
    """

    def __init__(self, log: logging.Logger, subject: str, meanwhile: str) -> None:
        self._log = log
        self._subject = subject
        self._meanwhile = meanwhile
        self._began: float | None = None

    def began(self, reason: str) -> None:
        """Record a failure. Only the first one until `ended` is logged."""
        if self._began is None:
            self._began = time.monotonic()
            self._log.warning("%s is not available, %s: reason=%r", self._subject, self._meanwhile, reason)

    def ended(self) -> None:
        """Record a success. It is logged only after `began`."""
        if self._began is not None:
            outage_s = time.monotonic() - self._began
            self._log.info("%s is available again: outage_s=%.1f", self._subject, outage_s)
            self._began = None
