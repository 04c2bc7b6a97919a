"""One turn of an engine: plan, compute, commit, and what the transfer has to do in between.

A turn is the same whoever drives it: a thread (stepping.py) or an event loop on a virtual clock
(virtual.py). A driver applies commands between turns, never during one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial

import msgspec
from msgspec.structs import replace

from penstock.engines.assets import Assets
from penstock.engines.batch import BatchRow, Runner
from penstock.engines.effects import Export, Pull, Retract
from penstock.engines.scheduler import Scheduler
from penstock.engines.settings import SchedulerSettings
from penstock.errors import PenstockError, RemoteError
from penstock.ports import EngineStep, KvTransfer, Pulled
from penstock.shapes import Attempt, EngineCard, Load, Sampling

log = logging.getLogger("penstock.engine")

MAX_FAILED_STEPS = 3
"""Failed steps in a row after which the engine is given up: one may be a single bad attempt, which has
then ended; several mean that the runner is broken, and attempts are better served elsewhere."""

SIGN_S = 1.0
"""Seconds between two turns while attempts wait for something else than this engine (a pull, blocks that
are held for others): that turns are taken is how others know that it is not stuck."""

Command = Callable[[float], None]
"""Something for the scheduler, called between turns with the time in seconds."""


class LoadedModel(msgspec.Struct):
    """What an engine is built around."""

    card: EngineCard
    """`transport` and `max_batch_tokens` are filled in by `build_cycle`."""

    assets: Assets

    runner: Runner

    pool: memoryview
    """The KV pool, as KvTransfer.start wants it."""

    refusal: Callable[[Sampling], str | None] = lambda sampling: None
    """Why the runner could not draw tokens in this way, in words; None when it could. Called between turns,
    for each attempt."""


class EngineCycle:
    """Drives a scheduler, a runner and a transfer through steps. Used from one thread at a time, but for
    `adding`.

    Args:
        transfer: None when KV never moves; started and stopped by whoever owns the engine.
        now: the clock, in seconds.
        post: takes a Command from any thread, to be applied between two turns.
        refusal: as LoadedModel's.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        transfer: KvTransfer | None,
        now: Callable[[], float],
        post: Callable[[Command], None],
        refusal: Callable[[Sampling], str | None],
    ) -> None:
        self.scheduler = scheduler
        self._runner = runner
        self._transfer = transfer
        self._now = now
        self._post = post
        self._refusal = refusal
        self.failed_steps = 0  # in a row, until now
        self._stop_at: float | None = None
        self._sign_at: float | None = None
        self._reported = Load()

    @property
    def wake_at(self) -> float | None:
        """When the next turn must begin at the latest, even without commands or a batch."""
        deadlines = (self.scheduler.next_deadline, self._stop_at, self._sign_at)
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    @property
    def finished(self) -> bool:
        """Told to stop, and either out of work or out of time."""
        return self._stop_at is not None and (self.scheduler.idle or self._now() >= self._stop_at)

    @property
    def broken(self) -> bool:
        """Whether so many steps in a row have failed that the engine was given up."""
        return self.failed_steps >= MAX_FAILED_STEPS

    def adding(self, attempt: Attempt) -> Command:
        """What to post for an attempt that comes now: compute it, or end it if its tokens cannot be drawn.
        It waits from now on, and not only from the end of the turn that is under way. For any thread."""
        return partial(self._add, attempt, self._now())

    def _add(self, attempt: Attempt, came_at: float, now: float) -> None:
        reason = self._refusal(attempt.sampling)
        if reason is None:
            self.scheduler.add(attempt, came_at)
        else:
            self.scheduler.refuse(attempt.attempt_id, reason)

    def stop(self, deadline: float, now: float) -> None:
        """A Command, with the rest bound: be `finished` by the deadline, or before, once out of work."""
        self._stop_at = deadline

    def begin(self, commands: Iterable[Command]) -> list[BatchRow]:
        """Apply commands in order and plan the next batch, for `compute`; empty when there is nothing to
        compute. Starts pulls."""
        for command in commands:
            command(self._now())
        batch = self.scheduler.plan(self._now())
        self._sign_at = None
        if not batch:
            self.scheduler.idled()
            if self.scheduler.busy:
                self._sign_at = self._now() + SIGN_S
        self._act()
        return batch

    def compute(self, batch: list[BatchRow]) -> None:
        """Run a planned batch, and commit or fail it. Raises RemoteError when the engine is broken."""
        try:
            samples = self._runner.run(batch)
        except Exception as error:  # whatever a model raises, it is this step's attempts that fail
            log.exception("step failed: rows=%d", len(batch))
            self.failed_steps += 1
            if self.broken:
                raise RemoteError(f"{self.failed_steps} steps in a row failed, last: {error!r}") from error
            self.scheduler.fail_batch(f"step failed: {error!r}", self._now())
        else:
            self.failed_steps = 0
            self.scheduler.commit(samples, self._now())
        self._act()

    def cancel_all(self) -> None:
        """End what is left when the time is up."""
        self.scheduler.cancel_all(self._now())
        self._act()

    def report(self) -> EngineStep | None:
        """All that is new since the last report; None when nothing is."""
        step = self.scheduler.report()
        if not (step.outputs or step.stored or step.removed) and step.load == self._reported:
            return None
        self._reported = step.load
        return step

    def _act(self) -> None:
        for effect in self.scheduler.effects():
            assert self._transfer is not None, "a scheduler without a transfer has no effects"
            match effect:
                case Export():
                    self._export(self._transfer, effect)
                case Pull():
                    self._pull(self._transfer, effect)
                case Retract(handoff_id):
                    done = self._transfer.retract(handoff_id)
                    self.scheduler.retracted(handoff_id, done, self._now())

    def _export(self, transfer: KvTransfer, export: Export) -> None:
        handoff_id = export.handoff.handoff_id
        try:
            address, params = transfer.export(handoff_id, export.block_ids)
        except PenstockError as error:
            log.warning("KV transfer cannot export: handoff=%s: %s", handoff_id, error)
            self.scheduler.export_failed(export, str(error), self._now())
        else:
            self.scheduler.exported(export, address, params)

    def _pull(self, transfer: KvTransfer, pull: Pull) -> None:
        def on_done(pulled: Pulled) -> None:  # on a thread of the transfer's
            self._post(partial(self._pull_done, pull.attempt_id, pulled, self._now()))

        try:
            transfer.pull(pull.handoff, pull.source_indices, pull.block_ids, pull.timeout_s, on_done)
        except PenstockError as error:
            on_done(Pulled(blocks=0, bytes=0, seconds=0.0, error=str(error)))

    def _pull_done(self, attempt_id: str, pulled: Pulled, ended_at: float, now: float) -> None:
        self.scheduler.pull_done(attempt_id, pulled, ended_at)


def build_cycle(
    model: LoadedModel,
    settings: SchedulerSettings,
    transfer: KvTransfer | None,
    now: Callable[[], float],
    post: Callable[[Command], None],
    scheduler: type[Scheduler] = Scheduler,
) -> EngineCycle:
    """A cycle around a loaded model, its transfer started and its card complete. May block for as long as
    the transfer takes to start; arguments as of EngineCycle."""
    card = replace(
        model.card,
        max_batch_tokens=settings.max_batch_tokens,
        transport=transfer.name if transfer is not None else "",
    )
    made = scheduler(card, settings)
    if transfer is not None:
        transfer.start(model.pool, lambda handoff_id: post(partial(made.pulled, handoff_id)))
    log.info("engine ready: %s", card)
    return EngineCycle(made, model.runner, transfer, now, post, model.refusal)
