"""What all tests share."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.loop_watch import LoopWatch

# A property's example may take as long as it takes: a busy machine is no failure.
settings.register_profile("penstock", deadline=None)
settings.load_profile("penstock")


@pytest.fixture(autouse=True)
def files_that_were_renewed_count_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is: they are read at once, and not in a thread that may be late."""
    monkeypatch.setattr("penstock.net.renewed.start_thread", lambda run: run())


@pytest.fixture(autouse=True)
def nothing_holds_up_the_event_loop(request: pytest.FixtureRequest) -> Iterator[None]:
    """What the package does on a test's event loop takes at most 50 ms at a time (loop_watch.py)."""
    if not inspect.iscoroutinefunction(getattr(request, "function", None)):
        yield
        return
    with LoopWatch() as watch:
        yield
    assert not watch.found, "\n".join(watch.found)
