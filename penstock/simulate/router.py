"""The router's decisions on an event queue: what router/router.py does with links, done with direct calls.

Index, loads, admission, lifecycle and policy are the real ones. A worker's report arrives when its step
ends, an attempt when it is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from random import Random

from penstock.core.attempt_phases import engine_times
from penstock.core.dispatcher import Dispatcher, RequestRecord
from penstock.core.events import (
    CancelAttempt,
    ClientGone,
    DeliverOutput,
    Effect,
    FailRequest,
    NoteChoice,
    ReleaseKv,
    SendAttempt,
)
from penstock.core.membership import Membership
from penstock.core.placement import Placement
from penstock.core.settings import RouterSettings
from penstock.core.wait_prediction import Refusal
from penstock.ports import EngineStep
from penstock.shapes import Attempt, Card, Delta, ModelKey, Registration, Request
from penstock.simulate.engine import SimulatedEngine
from penstock.simulate.events import EventQueue

OnDelta = Callable[[Delta], None]
OnEnd = Callable[[str], None]
"""Takes why a request was refused or failed."""


class Client:
    """Who submitted a request."""

    __slots__ = ("on_delta", "on_error")

    def __init__(self, on_delta: OnDelta, on_error: OnEnd) -> None:
        self.on_delta = on_delta
        self.on_error = on_error


class SimulatedRouter:
    """One frontend's decisions over workers that are all there from the beginning."""

    def __init__(self, events: EventQueue, settings: RouterSettings, rng: Random) -> None:
        self._events = events
        self._settings = settings
        self._engines: dict[str, SimulatedEngine] = {}
        self.membership = Membership()
        self.placement = Placement(settings.policy, settings.disagg, rng, settings.slo_itl_ms)
        self.dispatcher = Dispatcher(settings, self.membership, self.placement, rng, events.now())
        self._sent: dict[str, int] = {}

    def add_workers(self, workers: dict[str, tuple[Card, SimulatedEngine]]) -> None:
        """All workers of the graph, by instance id."""
        self.membership.discovered(
            {
                name: Registration(name, card.incarnation.epoch, card.role, card.model.name, name)
                for name, (card, _) in workers.items()
            }
        )
        for name, (card, engine) in workers.items():
            self._engines[name] = engine
            self._sent[name] = 0
            self.membership.up(name, card)
            self.placement.up(card, engine.load())
            self.membership.loaded(name)
        self.membership.elect()
        self._events.after(self._settings.tick_s, self._tick)

    def model(self) -> ModelKey:
        """What is served."""
        ((model, revision),) = self.membership.served.items()
        return ModelKey(model, revision)

    def submit(self, request: Request, client: Client) -> RequestRecord | None:
        """As Router.submit. None: it was refused, and `client` told."""
        for engine in self._engines.values():
            engine.catch_up()
        record = self.dispatcher.submit(request, client, self._events.now())
        if isinstance(record, Refusal):
            client.on_error(f"refused ({record.reason})")
            return None
        self._perform(record, self.dispatcher.place(record, self._events.now()))
        refusal = self.dispatcher.hopeless(record)
        if refusal is not None:
            self._perform(record, self.dispatcher.handle(record, ClientGone(), self._events.now()))
            client.on_error(f"refused ({refusal.reason})")
            return None
        return record

    def reported(self, instance_id: str, step: EngineStep, ended_at: float) -> None:
        """A worker's step ended, at that time."""
        now, find = self._events.now(), self.dispatcher.attempts.get
        self.placement.cache_changed(instance_id, step.stored, step.removed, step.cleared)
        self.placement.reported(instance_id, step.load.submitted, step.load, ended_at)
        reports = {report.attempt_id: report for report in step.ended}
        for output in step.outputs:
            report = reports.get(output.attempt_id)
            if report is not None:
                output.took = engine_times(report)
            record = find(output.attempt_id)
            if record is not None:
                if output.cached_tokens is not None:
                    self.placement.cached(
                        record.placed, instance_id, output.cached_tokens, output.transferred_blocks
                    )
                self._perform(record, self.dispatcher.output(record, output, now))
                continue
            if output.took is not None:
                self.dispatcher.decisions.late(output.attempt_id, output.took)
            if output.handoff is not None:
                self._release(instance_id, output.handoff.handoff_id)
        self._place(self.dispatcher.turns_after_report(now))

    def _tick(self) -> None:
        now = self._events.now()
        for record in self.dispatcher.due(now):
            self._perform(record, self.dispatcher.tick(record, now))
        self._place(self.dispatcher.turns(now))
        self.placement.index.sweep()
        self._events.after(self._settings.tick_s, self._tick)

    def _place(self, records: Iterable[RequestRecord]) -> None:
        for record in records:
            self._perform(record, self.dispatcher.place(record, self._events.now()))

    def _perform(self, record: RequestRecord, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case DeliverOutput(delta):
                    record.client.on_delta(delta)
                case SendAttempt(instance_id, attempt):
                    self._send(record, instance_id, attempt)
                case CancelAttempt(instance_id, attempt_id):
                    scheduler = self._engines[instance_id].scheduler
                    self._engines[instance_id].post(partial(scheduler.cancel, attempt_id))
                case ReleaseKv(instance_id, handoff_id):
                    self._release(instance_id, handoff_id)
                case FailRequest(error):
                    record.client.on_error(error.code or str(error))
                case NoteChoice():
                    pass

    def _send(self, record: RequestRecord, instance_id: str, attempt: Attempt) -> None:
        self._sent[instance_id] += 1
        self.dispatcher.sent(record, instance_id, self._sent[instance_id], attempt, self._events.now())
        self._engines[instance_id].add(attempt)

    def _release(self, instance_id: str, handoff_id: str) -> None:
        engine = self._engines[instance_id]
        engine.post(partial(engine.scheduler.release, handoff_id))
