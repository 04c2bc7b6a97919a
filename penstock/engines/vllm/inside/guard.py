"""vLLM's processes end with the worker that started them, however that ended.

Left to themselves they would not notice that it was killed, and keep the GPU for ever. They look at the
process itself, as a parent's death signal would come when the *thread* that started them ends.

A terminal's Ctrl-C reaches them too, but is their worker's to answer: it lets requests end first.

And all of them end quickly: Python would spend seconds of CPU on looking for garbage among the millions of
objects that torch and vLLM made, at the very end of their process.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import select
import shutil
import signal
from functools import cache
from pathlib import Path
from threading import Thread, current_thread, main_thread

OWNER_VARIABLE = "PENSTOCK_ENGINE_OWNER"
"""Environment variable with the process id of the worker; vLLM's processes inherit it."""

DIRECTORY_VARIABLE = "PENSTOCK_ENGINE_DIRECTORY"
"""The same with a directory that is to be removed when the worker ends without having done so."""


def own_engines(directory: Path | None) -> None:
    """The engines that this process will start are its own, and so is this directory."""
    os.environ[OWNER_VARIABLE] = str(os.getpid())
    os.environ[DIRECTORY_VARIABLE] = str(directory or "")
    atexit.register(gc.freeze)


@cache
def die_with_owner() -> None:
    """Watch the owner from now on, if there is one and it is not this process. Also a vLLM plugin (see
    pyproject.toml), which every process of vLLM's calls; elsewhere it does nothing."""
    owner = os.environ.get(OWNER_VARIABLE, "")
    if owner.isdecimal() and int(owner) != os.getpid():
        atexit.register(gc.freeze)
        if current_thread() is main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        directory = os.environ.get(DIRECTORY_VARIABLE, "")
        Thread(target=_watch, args=(int(owner), directory), name="penstock-guard", daemon=True).start()


def _watch(owner: int, directory: str) -> None:
    try:
        descriptor = os.pidfd_open(owner)
    except ProcessLookupError:
        pass  # it is gone already
    else:
        poll = select.poll()  # `select` takes no descriptor beyond 1023
        poll.register(descriptor, select.POLLIN)
        poll.poll()
    if directory:
        shutil.rmtree(directory, ignore_errors=True)
    for process in _others_of(owner):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _others_of(owner: int) -> list[int]:
    """Processes of the same owner, among which some never load this module: vLLM's coordinator of data
    parallel ranks, and whatever has not come so far yet."""
    mark = f"{OWNER_VARIABLE}={owner}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue  # somebody else's, or gone
    return [process for process in found if process != os.getpid()]
