"""The base class of engines with an EngineCycle: it takes commands and gives out steps, on the event
loop."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from penstock.engines.active import scores_prompt
from penstock.engines.assets import Assets
from penstock.engines.cycle import Command, EngineCycle
from penstock.engines.outbox import Outbox
from penstock.engines.scheduler import Scheduler
from penstock.errors import PenstockError, RemoteError
from penstock.ports import EngineStep
from penstock.shapes import Attempt

log = logging.getLogger("penstock.engine")


class EngineBase(ABC):
    """The parts of the Engine port that do not depend on where the cycle's turns run."""

    def __init__(self) -> None:
        self._outbox = Outbox()
        self._cycle: EngineCycle | None = None  # until started
        self._assets = Assets({})

    def submit(self, attempt: Attempt) -> int:
        """As Engine.submit, once started."""
        self._post(self._started.adding(attempt))
        length, there = len(attempt.token_ids), 0
        if not scores_prompt(attempt):
            there = self._outbox.cached_tokens(attempt.token_ids, attempt.cache_salt, self.scheduler.card)
        if attempt.handoff is not None:
            there = max(there, attempt.handoff.num_tokens)
        return min(length, max(1, length - there))

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

    def exposition(self) -> bytes:
        """As Engine.exposition: the worker's metrics say all that there is to say."""
        return b""

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
