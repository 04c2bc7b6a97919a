"""The reader's threads, and the pulls that wait for a free thread, each with a deadline."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from penstock.ports import Pulled

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class QueuedPull:
    """One pull. `run` returns before `deadline` (of `time.monotonic`) and never raises."""

    run: Callable[[], Pulled]
    on_done: Callable[[Pulled], None]
    submitted: float
    deadline: float


class PullQueue:
    """Runs pulls in order of arrival on `max_pulls` threads. Another thread fails the pulls that waited too
    long or found the queue full. So every `on_done` is called in time, and by a thread of this object."""

    def __init__(self, max_pulls: int, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        lock = threading.Lock()
        self._work = threading.Condition(lock)  # notifies the pulling threads of a pull, or of the stop
        self._overdue = threading.Condition(
            lock
        )  # notifies the expiring thread that the next deadline may have changed
        self._waiting: deque[QueuedPull] = deque()
        self._refused: deque[QueuedPull] = deque()
        self._idle = 0
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._pull_forever, name=f"kv-pull-{number}", daemon=True)
            for number in range(max_pulls)
        ]
        self._threads.append(threading.Thread(target=self._expire_forever, name="kv-expire", daemon=True))

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def submit(self, pull: QueuedPull) -> None:
        """Raises RuntimeError after `stop`."""
        with self._work:
            if self._stopping:
                raise RuntimeError("the transfer was stopped")
            if len(self._waiting) >= self._max_waiting + self._idle:
                self._refused.append(pull)
                self._overdue.notify()
                return
            self._waiting.append(pull)
            self._work.notify()
            if len(self._waiting) > self._idle:
                self._overdue.notify()

    def stop(self, timeout_s: float) -> None:
        """End all waiting pulls with an error and join the threads, waiting `timeout_s` for each."""
        with self._work:
            self._stopping = True
            self._work.notify_all()
            self._overdue.notify_all()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout_s)

    def _pull_forever(self) -> None:
        while True:
            with self._work:
                self._idle += 1
                self._work.wait_for(lambda: self._waiting or self._stopping)
                self._idle -= 1
                if self._stopping:
                    return
                pull = self._waiting.popleft()
            _report(pull.on_done, pull.run())

    def _expire_forever(self) -> None:
        stopping = False
        while not stopping:
            with self._overdue:
                now = time.monotonic()
                nearest = min((pull.deadline for pull in self._waiting), default=None)
                if not self._refused and not self._stopping and (nearest is None or nearest > now):
                    self._overdue.wait(None if nearest is None else nearest - now)
                now = time.monotonic()
                stopping = self._stopping
                refused, self._refused = self._refused, deque()
                late = [pull for pull in self._waiting if stopping or pull.deadline <= now]
                for pull in late:
                    self._waiting.remove(pull)
            for pull in refused:
                _fail(pull, f"{self._max_waiting} pulls wait already")
            for pull in late:
                _fail(pull, "the transfer was stopped" if stopping else "no puller was free in time")


def _fail(pull: QueuedPull, reason: str) -> None:
    _report(pull.on_done, Pulled(0, 0, time.monotonic() - pull.submitted, reason))


def _report(on_done: Callable[[Pulled], None], pulled: Pulled) -> None:
    """Call `on_done`. An exception that it raises is logged, and does not end the calling thread."""
    try:
        on_done(pulled)
    except Exception:
        log.exception("transfer: on_done failed")
