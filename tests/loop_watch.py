"""Finds what holds up an event loop: callbacks that compute for too long, and callbacks that wait.

Wall-clock time is not judged, since on a busy machine it says more about the machine than about a callback:

- computing is CPU time of the loop's thread, without what the garbage collector took. A callback with more
  than LIMIT_S of it is found, if most looks at it met the package.
- waiting is seen from another thread, which looks at the loop's thread every LOOK_S. A thread that sits in
  the same system call (a read, a poll, a sleep, an fsync) at every look for LIMIT_S is found; one that is
  ready to run and gets no processor is not. Waiting for a lock looks like waiting for the interpreter (the
  GIL), so it is found only where it goes through Python's own threading, queue or concurrent.futures; and
  a thread that is being started waits for a processor, as does a process (vfork waits until it is).

Only what happens below a function of the package counts, not what a test itself does on the loop. Without
/proc (not Linux) only computing is found; a uvloop's callbacks are not seen at all.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

import penstock

LIMIT_S = 0.05
LOOK_S = 0.01
_NO_SWITCH_S = 60.0  # between two threads, where only one should run
_SWITCH_S = sys.getswitchinterval()  # at all other times; asked for once, as another watch may be looking

_PACKAGE = str(Path(penstock.__file__).parent)
_LOCKS = ("/threading.py", "/queue.py", "/concurrent/futures/_base.py")
_FUTEX = {"x86_64": "202", "aarch64": "98"}
_VFORK = {"x86_64": "58", "aarch64": "220"}  # there it is a kind of clone


_Call = tuple[CodeType, int | None]
"""A function that runs, and the line it is at."""


class LoopWatch:
    """Watches the asyncio loops that run in this thread while it is entered."""

    def __init__(self) -> None:
        self.found: list[str] = []
        """What held up the loop, each with where it happened."""
        self._thread_id = threading.get_ident()
        self._syscall = Path(f"/proc/self/task/{threading.get_native_id()}/syscall")
        self._callback: object | None = None  # that runs now; another object for each
        self._stack = ""  # below the package, when the running callback was last looked at
        self._looks = self._looks_inside = 0  # at the running callback; those that met the package
        self._collected_s = 0.0  # CPU time of the garbage collector in this thread
        self._collecting_since = 0.0
        self._ended = threading.Event()
        self._looking = threading.Thread(target=self._look_forever, name="loop watch", daemon=True)
        self._run: Callable[[Any], None] = asyncio.Handle._run

    def __enter__(self) -> LoopWatch:
        watch = self

        def run(handle: asyncio.Handle) -> None:
            if threading.get_ident() == watch._thread_id:
                watch._watched(handle)
            else:
                watch._run(handle)

        asyncio.Handle._run = run  # type: ignore[attr-defined]
        gc.callbacks.append(self._on_gc)
        self._looking.start()
        return self

    def __exit__(self, *exc: object) -> None:
        asyncio.Handle._run = self._run  # type: ignore[attr-defined]
        gc.callbacks.remove(self._on_gc)
        self._ended.set()
        self._looking.join()

    def _watched(self, handle: asyncio.Handle) -> None:
        self._stack = ""
        self._looks = self._looks_inside = 0
        self._callback = object()
        collected_s, began = self._collected_s, time.thread_time()
        try:
            self._run(handle)
        finally:
            self._callback = None
            computed_s = time.thread_time() - began - (self._collected_s - collected_s)
            if computed_s > LIMIT_S and 2 * self._looks_inside > self._looks:
                self.found.append(
                    f"{handle!r} computed for {computed_s * 1e3:.0f} ms, as here:\n{self._stack}"
                )

    def _on_gc(self, phase: str, _info: dict[str, int]) -> None:
        if threading.get_ident() == self._thread_id:
            if phase == "start":
                self._collecting_since = time.thread_time()
            else:
                self._collected_s += time.thread_time() - self._collecting_since

    # --- the thread that looks ------------------------------------------------------------------------

    def _look_forever(self) -> None:
        seen: tuple[object, str] | None = None  # the callback that waits, and in which call
        since = 0.0
        while not self._ended.wait(LOOK_S):
            callback = self._callback
            if callback is None:
                seen = None
                continue
            calls = _calls(self._thread_id)
            stack = _below_the_package(calls)
            if self._callback is callback:
                self._looks += 1
                self._looks_inside += bool(stack)
                self._stack = stack or self._stack
            call = self._waits_in(calls) if stack else ""
            if not call or callback is not self._callback:
                seen = None
            elif seen != (callback, call):
                seen, since = (callback, call), time.monotonic()
            elif time.monotonic() - since > LIMIT_S:
                self.found.append(f"it waited in system call {call.split()[0]}, here:\n{stack}")
                seen = None

    def _waits_in(self, calls: list[_Call]) -> str:
        """The system call in which the loop's thread waits, with its arguments; empty when it does not."""
        try:
            call = self._syscall.read_text().strip()
        except OSError:
            return ""
        number = call.split()[0]
        if number == "running":
            return ""
        if number in _FUTEX.values() and not calls[0][0].co_filename.endswith(_LOCKS):
            return ""  # for all that can be told, it waits for the GIL
        if number in _VFORK.values():
            return ""
        if len(calls) > 2 and calls[2][0] is threading.Thread.start.__code__:
            return ""
        return call


def _calls(thread_id: int) -> list[_Call]:
    """The calls that a thread is in, innermost first; none of one that has ended.

    Python may go on with that thread between any two steps of this one, and what it has left by then is no
    frame any more: following it has crashed the process. So nothing is switched while they are read.
    """
    sys.setswitchinterval(_NO_SWITCH_S)
    try:
        calls = []
        frame = sys._current_frames().get(thread_id)
        while frame is not None:
            calls.append((frame.f_code, frame.f_lineno))
            frame = frame.f_back
        return calls
    finally:
        sys.setswitchinterval(_SWITCH_S)


def _below_the_package(calls: list[_Call]) -> str:
    """The stack if any function of the package is in it; else empty."""
    if not any(code.co_filename.startswith(_PACKAGE) for code, _ in calls):
        return ""
    entries = [traceback.FrameSummary(code.co_filename, line, code.co_name) for code, line in calls[:12]]
    return "".join(traceback.format_list(entries[::-1]))
