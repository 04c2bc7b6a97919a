"""Blocking calls that may never return: a file on a network folder whose server is gone, for example.

asyncio's own threads do not do for them: the event loop and the interpreter both wait for those threads
before a process ends.
"""

from __future__ import annotations

import _thread
import asyncio
import errno
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


def start_thread(run: Callable[[], None]) -> None:
    """Run it in a thread for which nothing waits, neither at the end of the process nor at its beginning:
    `threading.Thread.start` waits until the thread runs, which takes long on a busy machine.

    Raises OSError when the system has no thread to give.
    """
    try:
        _thread.start_new_thread(run, ())
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, str(error)) from None


def detached(call: Callable[[], T]) -> asyncio.Future[T]:
    """Run `call` in a thread of its own, for which nothing waits.

    The future has its result, or what it raised. Cancelling the future leaves the call running. Raises
    OSError when the system has no thread to give.
    """
    outcome: Future[T] = Future()
    outcome.set_running_or_notify_cancel()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:  # noqa: BLE001 whoever awaits the future gets it
            outcome.set_exception(error)

    start_thread(run)
    return asyncio.wrap_future(outcome)


class PatientCaller(Generic[T]):
    """Makes blocking calls one at a time, and limits how long each is waited for.

    A call that does not return in time is not repeated, which would only add another thread that hangs:
    the next `result` waits for the same call.

    Args:
        limit_s: seconds that one `result` may take.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._running: asyncio.Future[T] | None = None

    async def result(self, call: Callable[[], T]) -> T:
        """What `call` returns or raises; or that of an earlier call that had not returned in time.

        Raises TimeoutError when it has not returned in time.
        """
        if self._running is None:
            self._running = detached(call)
        await asyncio.wait([self._running], timeout=self._limit_s)
        if not self._running.done():
            raise TimeoutError(f"no answer in {self._limit_s:g} s")
        finished, self._running = self._running, None
        return finished.result()

    async def idle(self) -> None:
        """Wait until no earlier call is running, whatever comes of it."""
        if self._running is not None:
            await asyncio.wait([self._running])
            self._running.exception()  # read, or asyncio would log that nobody did
            self._running = None
