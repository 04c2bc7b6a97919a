"""What the log says about an outage of discovery: once that it began and why, once that it is over."""

from __future__ import annotations

import logging
import time


class Outage:
    """One thing that may stop working, and work again.

    Args:
        log: where it is said.
        subject: what may stop working, at the beginning of each line.
        meanwhile: what happens as long as it does not work.
    """

    def __init__(self, log: logging.Logger, subject: str, meanwhile: str) -> None:
        self._log = log
        self._subject = subject
        self._meanwhile = meanwhile
        self._began: float | None = None

    def began(self, reason: str) -> None:
        """It does not work. Said once until `ended`."""
        if self._began is None:
            self._began = time.monotonic()
            self._log.warning("%s is not available, %s: reason=%r", self._subject, self._meanwhile, reason)

    def ended(self) -> None:
        """It works. Said only after `began`."""
        if self._began is not None:
            outage_s = time.monotonic() - self._began
            self._log.info("%s is available again: outage_s=%.1f", self._subject, outage_s)
            self._began = None
