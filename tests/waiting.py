"""Waiting for something that tests cannot subscribe to, by looking again and again."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

WITHIN_S = 30.0
"""What comes at all comes in a moment; a busy machine may take long over it."""

LOOK_S = 0.005
"""Between two looks. Longer where each look costs something."""

What = str | Callable[[], object]
"""What is waited for, or a function that tells what is there instead."""


def wait_until(
    holds: Callable[[], T], what: What = "", within_s: float = WITHIN_S, look_s: float = LOOK_S
) -> T:
    """Wait until `holds()` is true, and return what it is."""
    deadline = time.monotonic() + within_s
    while not (value := holds()):
        assert time.monotonic() < deadline, _message(what, within_s)
        time.sleep(look_s)
    return value


async def until(
    holds: Callable[[], object], what: What = "", within_s: float = WITHIN_S, look_s: float = LOOK_S
) -> None:
    """The same on an event loop. `holds` may return an awaitable, whose result counts."""
    clock = asyncio.get_running_loop().time
    deadline = clock() + within_s
    while True:
        value = holds()
        if await value if inspect.isawaitable(value) else value:
            return
        assert clock() < deadline, _message(what, within_s)
        await asyncio.sleep(look_s)


def _message(what: What, within_s: float) -> str:
    return f"not within {within_s} s: {what() if callable(what) else what}"
