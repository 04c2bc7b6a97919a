"""`penstock worker` whose cache events are wrong.

    python -m tests.e2e.false_events_worker FAULT SIZE worker ...

FAULT is one of tests/false_events.py; it begins, and ends again, with SIGUSR1. SIZE is the block size that
the worker claims to have; 0: the true one.
"""

from __future__ import annotations

import signal
import sys
from typing import Any

from penstock import assembly
from penstock.cli import main
from tests.false_events import FalseEvents


def _run(fault: str, claimed_block_size: int) -> None:
    real = assembly._engine

    def engine(*args: Any) -> FalseEvents:
        it = FalseEvents(real(*args), claimed_block_size or None)

        def turn(*_: object) -> None:
            it.fault = "" if it.fault else fault

        signal.signal(signal.SIGUSR1, turn)
        return it

    assembly._engine = engine  # type: ignore[assignment]
    main()


if __name__ == "__main__":
    name, size = sys.argv.pop(1), sys.argv.pop(1)
    _run(name, int(size))
