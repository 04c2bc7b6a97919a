"""Penstock's processes, for benchmarks that want no launcher between."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0


def start(arguments: list[str], output: object = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    """`penstock` with these arguments; `output` gets its log."""
    return subprocess.Popen(
        [sys.executable, "-m", "penstock", *arguments], stdout=subprocess.DEVNULL, stderr=output
    )


class CoreTime(NamedTuple):
    """What processes did with the machine's cores, in seconds over all of their threads."""

    computed: float
    waited: float
    """Ready to compute, while others had the cores."""

    def since(self, before: CoreTime) -> CoreTime:
        return CoreTime(self.computed - before.computed, self.waited - before.waited)


def core_time(processes: Sequence[subprocess.Popen[bytes]]) -> CoreTime:
    """Since these processes began, as Linux counts it; threads that have ended are left out."""
    computed_ns = waited_ns = 0
    for process in processes:
        for thread in Path(f"/proc/{process.pid}/task").glob("*/schedstat"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                computed, waited, _ = map(int, thread.read_text().split())
                computed_ns, waited_ns = computed_ns + computed, waited_ns + waited
    return CoreTime(computed_ns / 1e9, waited_ns / 1e9)


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End all of them, orderly and at the same time."""
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        process.wait(timeout=STOP_TIMEOUT_S)


def wait_ready(log_file: Path, workers: int, timeout_s: float = READY_TIMEOUT_S) -> str:
    """The URL of the frontend that logs there, once it has so many workers."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        text = log_file.read_text()
        if "listening on " in text and text.count("instance ready") == workers:
            return text.split("listening on ")[1].split()[0]
        time.sleep(0.1)
    raise SystemExit(f"the frontend did not get ready:\n{log_file.read_text()}")
