"""What all tests share."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

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


# --- in several processes (`make test`) -------------------------------------------------------------

FIRST = "tests/e2e/"
"""What waits more than it computes: begun first, it has others beside it that compute."""

ALONE = (
    "tests/faults/test_mutations.py",
    "tests/faults/test_simulation.py",
    "tests/fuzz/test_fuzz.py",
    "tests/router/test_waits.py",
)
"""Files whose cases compute for long and share nothing: each case goes to whichever process is free."""

SAME_GRAPHS = tuple(f"tests/e2e/test_{name}.py" for name in ("document", "equality", "official_sdks"))
"""Files that use the same graphs of several processes, which are started only once."""


def part_of(nodeid: str) -> str:
    """The part of the tests that runs as a whole in one process: a file, but for those above."""
    file = nodeid.partition("::")[0]
    return nodeid if file in ALONE else "graphs" if file in SAME_GRAPHS else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class InParts(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return part_of(nodeid)

    config.option.loadscopereorder = False  # the number of cases says nothing of how long they take
    return InParts(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits, then the others, then what computes for long and fills up the time that is left."""

    def turn(item: pytest.Item) -> int:
        return 0 if item.nodeid.startswith(FIRST) else 2 if item.nodeid.startswith(ALONE) else 1

    items.sort(key=turn)
