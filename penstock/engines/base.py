"""The base class of engines with an EngineCycle: it takes commands and gives out steps, on the event
loop."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from penstock.engines.assets import Assets
from penstock.engines.cycle import Command, EngineCycle
from penstock.engines.outbox import Outbox
from penstock.engines.scheduler import Scheduler
from penstock.errors import PenstockError, RemoteError
from penstock.shapes import Attempt, EngineStep

log = logging.getLogger("penstock.engine")


class EngineBase(ABC):
    """The parts of the Engine port that do not depend on where the cycle's turns run."""

    def __init__(self) -> None:
        self._outbox = Outbox()
        self._cycle: EngineCycle | None = None  # until started
        self._assets = Assets({})

    def submit(self, attempt: Attempt) -> None:
        """As Engine.submit, once started."""
        self._post(partial(self._started.add, attempt))

    def cancel(self, attempt_id: str) -> None:
        """As Engine.cancel."""
        self._post(partial(self.scheduler.cancel, attempt_id))

    def release(self, handoff_id: str, *, sent: bool) -> None:
        """As Engine.release. `sent` makes no difference, since the transfer knows whether a reader has
        begun."""
        self._post(partial(self.scheduler.release, handoff_id))

    def cached_hashes(self) -> Sequence[int]:
        """As Engine.cached_hashes; a copy."""
        return self._outbox.cached_hashes()

    def asset(self, sha256: str) -> bytes | None:
        """As Engine.asset."""
        return self._assets.get(sha256)

    def steps(self) -> AsyncIterator[EngineStep]:
        """As Engine.steps, for one reader. Ends after `stop`; raises RemoteError if the engine failed."""
        return self._outbox.read()

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler. Only the code that runs the turns may change it."""
        return self._started.scheduler

    @property
    def _started(self) -> EngineCycle:
        assert self._cycle is not None, "the engine was not started"
        return self._cycle

    @abstractmethod
    def _post(self, command: Command) -> None:
        """Queue a command for the next turn."""

    def _hand_out(self, cycle: EngineCycle) -> None:
        step = cycle.report()
        if step is not None:
            self._outbox.push(step)

    @contextmanager
    def _ending_steps(self) -> Iterator[None]:
        """End `steps()` when the turns end, for whatever reason; otherwise its reader would wait for
        ever."""
        error: PenstockError | None = None
        try:
            yield
        except PenstockError as reason:
            error = reason
        except Exception as bug:  # a bug in Penstock: the cycle translates the runner's errors
            log.exception("the engine failed")
            error = RemoteError(f"the engine failed: {bug!r}")
        finally:
            self._outbox.close(error)
