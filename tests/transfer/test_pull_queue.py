from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from penstock.ports import Pulled
from penstock.transfer.pull_queue import PullQueue, QueuedPull
from tests.waiting import wait_until

SOON_S = 60.0
GOOD = Pulled(1, 1, 0.0)


@pytest.fixture
def queue() -> Iterator[PullQueue]:
    queue = PullQueue(max_pulls=2, max_waiting=3)
    queue.start()
    yield queue
    queue.stop(SOON_S)


class Ends:
    """Collects what pulls ended with, by name, and on which thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.errors: list[tuple[str, str | None]] = []
        self.threads: set[str] = set()

    def named(self, name: str) -> Callable[[Pulled], None]:
        def on_done(pulled: Pulled) -> None:
            with self._changed:
                self.errors.append((name, pulled.error))
                self.threads.add(threading.current_thread().name)
                self._changed.notify_all()

        return on_done

    def wait(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.errors) >= count, SOON_S)


def submit(queue: PullQueue, run: Callable[[], Pulled], on_done, timeout_s: float = SOON_S) -> None:
    now = time.monotonic()
    queue.submit(QueuedPull(run, on_done, now, now + timeout_s))


def test_no_more_run_at_once_than_allowed_and_first_come_is_first_served(queue) -> None:
    ends, release, started = Ends(), threading.Event(), []

    def blocked(name: str) -> Callable[[], Pulled]:
        def run() -> Pulled:
            started.append(name)
            release.wait(SOON_S)
            return GOOD

        return run

    for name in ("a", "b"):
        submit(queue, blocked(name), ends.named(name))
    wait_until(lambda: len(started) == 2, "both run")
    for name in ("c", "d", "e"):
        submit(queue, blocked(name), ends.named(name))
    time.sleep(0.05)
    assert sorted(started) == ["a", "b"]
    submit(queue, blocked("too many"), ends.named("too many"))
    ends.wait(1)
    assert ends.errors == [("too many", "3 pulls wait already")]
    assert ends.threads == {"kv-expire"}
    release.set()
    ends.wait(6)
    assert sorted(started[2:]) == ["c", "d", "e"]
    assert started[2] != "e"


def test_each_waiting_pull_ends_at_its_own_deadline(queue) -> None:
    ends, release, started = Ends(), threading.Event(), []
    for name in ("a", "b"):
        submit(
            queue,
            lambda: (started.append(1), release.wait(SOON_S), GOOD)[2],
            ends.named(name),
            2 * SOON_S,
        )
    wait_until(lambda: len(started) == 2, "both run")
    begun = time.monotonic()
    submit(queue, lambda: GOOD, ends.named("late"), 1.0)
    submit(queue, lambda: GOOD, ends.named("early"), 0.1)
    ends.wait(1)
    assert time.monotonic() - begun >= 0.1
    ends.wait(2)
    assert time.monotonic() - begun >= 1.0
    assert [name for name, _ in ends.errors] == ["early", "late"]
    release.set()


def test_stopping_ends_every_pull_once_and_no_new_one_is_taken() -> None:
    queue, ends, release = PullQueue(1, 10), Ends(), threading.Event()
    queue.start()
    for number in range(5):
        submit(queue, lambda: (release.wait(SOON_S), GOOD)[1], ends.named(str(number)))
    time.sleep(0.05)
    stopper = threading.Thread(target=queue.stop, args=(SOON_S,))
    stopper.start()
    ends.wait(4)
    assert {error for _, error in ends.errors} == {"the transfer was stopped"}
    release.set()
    stopper.join()
    assert sorted(name for name, _ in ends.errors) == ["0", "1", "2", "3", "4"]
    with pytest.raises(RuntimeError, match="stopped"):
        submit(queue, lambda: GOOD, ends.named("new"))


def test_many_from_many_threads(queue) -> None:
    ends = Ends()
    unbounded = PullQueue(4, 1000)
    unbounded.start()

    def submitter(start: int) -> None:
        for number in range(start, start + 200):
            submit(unbounded, lambda: GOOD, ends.named(str(number)))

    threads = [threading.Thread(target=submitter, args=(200 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ends.wait(800)
    unbounded.stop(SOON_S)
    assert sorted(ends.errors) == sorted((str(number), None) for number in range(800))
