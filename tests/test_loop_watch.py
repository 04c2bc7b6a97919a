"""The watch finds what it says that it finds, and nothing else."""

from __future__ import annotations

import asyncio
import gc
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import FunctionType

import pytest

from tests import loop_watch
from tests.loop_watch import LoopWatch

LONG_S = 0.25


def computes(seconds: float = LONG_S) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def reads() -> None:
    reader, writer = os.pipe()
    threading.Timer(LONG_S, os.write, (writer, b"x")).start()
    os.read(reader, 1)
    os.close(reader)
    os.close(writer)


def runs_a_process() -> None:
    subprocess.run([sys.executable, "-c", f"import time; time.sleep({LONG_S})"], check=True)


def waits_for_a_queue() -> None:
    items: queue.Queue[int] = queue.Queue()
    threading.Timer(LONG_S, items.put, (1,)).start()
    items.get()


def sleeps() -> None:
    time.sleep(LONG_S)


def collects_garbage() -> None:
    for _ in range(20):
        gc.collect()


def others_compute() -> None:
    """It has little to do, and waits long for the interpreter."""
    busy = [threading.Thread(target=computes) for _ in range(3)]
    for thread in busy:
        thread.start()
    computes(0.02)


def found_in(call: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is found when this runs on an event loop as a function of the package."""
    monkeypatch.setattr(loop_watch, "_PACKAGE", __file__)

    async def main() -> None:
        asyncio.get_running_loop().call_soon(call)
        await asyncio.sleep(0.01)

    with LoopWatch() as watch:
        asyncio.run(main())
    return watch.found


@pytest.mark.parametrize("call", [computes, reads, runs_a_process, waits_for_a_queue, sleeps])
def test_what_holds_up_the_loop_is_found(call: FunctionType, monkeypatch: pytest.MonkeyPatch) -> None:
    found = found_in(call, monkeypatch)
    assert found
    assert call.__name__ in found[0]


@pytest.mark.parametrize("call", [collects_garbage, others_compute, lambda: computes(0.02)])
def test_what_does_not_is_not(call: FunctionType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found_in(call, monkeypatch) == []


def test_what_a_test_does_itself_is_not() -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_soon(sleeps)
        await asyncio.sleep(0.01)

    with LoopWatch() as watch:
        asyncio.run(main())
    assert watch.found == []
