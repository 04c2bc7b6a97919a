"""The engine shell on an event queue: the same turns as in engines/stepping.py, without threads or tasks.

A step takes the time that a cost model gives it, and nothing else takes any.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import sqrt

from penstock.engines.batch import BatchRow
from penstock.engines.cost_models import CostModel
from penstock.engines.cycle import Command, EngineCycle, LoadedModel, build_cycle
from penstock.engines.settings import SchedulerSettings
from penstock.ports import EngineStep, KvTransfer
from penstock.shapes import Attempt, Load
from penstock.simulate.answers import OwnTokens
from penstock.simulate.events import EventQueue
from penstock.simulate.scheduler import StridingScheduler


class SimulatedEngine:
    """One engine on `events`.

    Args:
        model: as SteppingEngine's `load` returns it. `tokens` takes the place of its runner.
        on_step: takes what each step has to say, and when the step ended.
    """

    def __init__(
        self,
        events: EventQueue,
        model: LoadedModel,
        tokens: OwnTokens,
        costs: CostModel,
        settings: SchedulerSettings,
        transfer: KvTransfer | None,
        on_step: Callable[[EngineStep, float], None],
    ) -> None:
        self._events = events
        self._costs = costs
        self._on_step = on_step
        self._commands: list[Command] = []
        self._batch: list[BatchRow] = []  # that is being computed
        self._steps = 0  # like this one that are taken together
        self._began = 0.0  # the first of them
        self._turns = 0  # so that an event knows whether it was meant for this one
        model.runner = tokens
        self._cycle: EngineCycle = build_cycle(
            model, settings, transfer, events.now, self.post, scheduler=StridingScheduler
        )
        assert isinstance(self._cycle.scheduler, StridingScheduler)
        self.scheduler = self._cycle.scheduler
        self.scheduler.tokens = tokens
        self.computing_s = 0.0  # how long it has computed, in all

    def add(self, attempt: Attempt) -> None:
        """Take an attempt."""
        self.post(self._cycle.adding(attempt))

    def post(self, command: Command) -> None:
        """Apply a command before the next step, which begins now if none is being computed."""
        self._commands.append(command)
        if len(self._commands) > 1:
            return
        if self._batch:
            if self._steps > 1:
                self._steps = min(self._steps, self._done() + 1)
                self._expect()
        else:
            self._turns += 1
            self._events.after(0.0, partial(self._turn, self._turns))

    def catch_up(self) -> None:
        """Say what the steps have given that ended until now."""
        if self._steps > 1 and (done := min(self._done(), self._steps - 1)):
            until_s = self._after(done)
            self._commit_stride(done, until_s)
            self._batch = self._cycle.begin([])
            self._compute(until_s)

    def load(self) -> Load:
        """The load as of now."""
        return self.scheduler.load()

    def _turn(self, turn: int) -> None:
        if turn != self._turns or self._batch:
            return
        cycle = self._cycle
        commands, self._commands = self._commands, []
        self._batch = cycle.begin(commands)
        if self._batch:
            self._compute(self._events.now())
            return
        self._report(self._events.now())
        self._turns += 1
        if cycle.wake_at is not None:
            self._events.at(cycle.wake_at, partial(self._turn, self._turns))

    def _compute(self, began: float) -> None:
        self._began = began
        self.scheduler.began(began)
        self._steps = 1 if self._commands else self.scheduler.stride()
        self._expect()

    def _expect(self) -> None:
        """Wait for the end of `_steps`."""
        self._turns += 1
        self._events.at(self._after(self._steps), partial(self._computed, self._turns))

    def _computed(self, turn: int) -> None:
        if turn != self._turns:
            return
        if self._steps > 1:
            self._commit_stride(self._steps, self._events.now())
        else:
            self.computing_s += self._events.now() - self._began
            batch, self._batch = self._batch, []
            self._cycle.compute(batch)
            self._report(self._events.now())
        self._turns += 1
        self._turn(self._turns)

    def _done(self) -> int:
        """How many steps of the present batch have ended."""
        first_ms = self._costs.steps_ms(self._batch, 1)
        # By which each step is longer than the one before.
        more_ms = self._costs.steps_ms(self._batch, 2) - 2 * first_ms
        passed_ms = (self._events.now() - self._began) * 1e3
        if more_ms <= 0.0:
            return int(passed_ms / first_ms + 1e-9)
        half = first_ms - more_ms / 2
        return int((sqrt(half * half + 2 * more_ms * passed_ms) - half) / more_ms + 1e-9)

    def _after(self, steps: int) -> float:
        """When so many steps of the present batch have ended."""
        return self._began + self._costs.steps_ms(self._batch, steps) / 1e3

    def _commit_stride(self, steps: int, until_s: float) -> None:
        """None of the attempts has ended by then."""
        self.computing_s += until_s - self._began
        self._batch = []
        self.scheduler.commit_stride(steps, until_s)
        self._report(until_s)

    def _report(self, ended_at: float) -> None:
        step = self._cycle.report()
        if step is not None:
            self._on_step(step, ended_at)
