"""The router: serves requests over all instances that discovery shows.

A shell. `instances.py` keeps a link to every instance and says which take part; `core/dispatcher.py`
decides what happens to requests. This module takes each event to the dispatcher, and carries out and counts
the effects that it returns. All of it runs on one event loop; no callback below awaits.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from penstock.clock import Clock, MonotonicClock
from penstock.core.attempt_times import AttemptTimes
from penstock.core.deadlines import Phase
from penstock.core.decision_record import RoutedRequest
from penstock.core.dispatcher import Dispatcher, RequestRecord
from penstock.core.events import (
    KILLER,
    Bounced,
    CancelAttempt,
    ClientGone,
    DeliverOutput,
    Effect,
    Event,
    FailRequest,
    InstanceLost,
    NoteChoice,
    ReleaseKv,
    SendAttempt,
    TooLong,
)
from penstock.core.explanation import ExplainedRequest, Explanation, explained
from penstock.core.misses import MissReport
from penstock.core.placement import Placement, explain
from penstock.core.recording import MAX_RECORDINGS, Recording, RecordingWanted
from penstock.core.settings import RouterSettings
from penstock.core.wait_prediction import Refusal
from penstock.errors import PenstockError, ProtocolError, Rejection, RemoteError, RequestRejected
from penstock.link.client import LinkClient
from penstock.link.settings import ClientSettings
from penstock.logs.quiet_log import QuietLog
from penstock.metrics import QueueView, RouterMetrics
from penstock.ports import Discovery
from penstock.router.instances import Instances, Prepare
from penstock.shapes import Attempt, Delta, Incarnation, InstanceView, ModelView, Output, Request, Role
from penstock.wire.messages import Bounce

log = logging.getLogger("penstock.router")
quiet = QuietLog(log)

MAX_SHOWN_NAME = 128  # characters of a name that nobody knows

OnDelta = Callable[[Delta], None]
OnError = Callable[[PenstockError], None]


class Ticket:
    """A submitted request, for its client, who may want to end it early."""

    __slots__ = ("_router", "broken", "on_delta", "on_error", "record")

    def __init__(self, router: Router, on_delta: OnDelta, on_error: OnError) -> None:
        self.on_delta = on_delta
        self.on_error = on_error
        self.record: RequestRecord
        self.broken = False  # by an error in this process
        self._router = router

    @property
    def attempts(self) -> Sequence[AttemptTimes]:
        return self.record.life.history

    def explain(self) -> ExplainedRequest:
        return self._router.explained(self.record.routed)

    def cancel(self, *, complete: bool = False) -> None:
        """The client does not want the rest: no more callbacks, and the engine stops. `complete`: because
        the answer ends here, not because its reader left. Idempotent."""
        self._router.handle(self.record, ClientGone(complete))


class Router:
    """Serves requests over all instances that discovery shows.

    `run()` must be running; everything else is called on its event loop.
    """

    def __init__(
        self,
        discovery: Discovery,
        settings: RouterSettings,
        link_settings: ClientSettings,
        metrics: RouterMetrics,
        *,
        frontend_id: str,
        clock: Clock | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._discovery = discovery
        self._settings = settings
        self._metrics = metrics
        self._clock = clock or MonotonicClock()
        rng = rng or random.Random()
        self.placement = Placement(settings.policy, settings.disagg, rng, settings.slo_itl_ms)
        # The instances, each with its link.
        self.fleet = Instances(
            discovery,
            self.placement,
            settings,
            link_settings,
            metrics,
            self._clock,
            rng,
            self,
            frontend_id=frontend_id,
        )
        self.membership, self.served_models = self.fleet.membership, self.fleet.served_models
        self.dispatcher = Dispatcher(settings, self.membership, self.placement, rng, self._clock.now())
        metrics.queues_from(self.queues)
        metrics.distrusted_from(self.placement.overlap_check.causes)

    # --- for the frontend: implements Completer (frontend/completer.py), which says what these do --------

    def models(self) -> dict[str, ModelView]:
        return self.served_models.models()

    def model(self, name: str) -> ModelView:
        return self.served_models.model(name)

    def instances(self) -> list[InstanceView]:
        return self.fleet.views()

    def missing(self) -> Sequence[Role]:
        return self.membership.missing(self._settings.expect)

    def discovery(self) -> str:
        return self._discovery.trouble

    def submit(self, request: Request, on_delta: OnDelta, on_error: OnError) -> Ticket:
        errors: list[PenstockError] = []  # that end it before this has returned
        record = self.dispatcher.submit(request, Ticket(self, on_delta, errors.append), self._clock.now())
        if isinstance(record, Refusal):
            raise self._overloaded(record)
        ticket: Ticket = record.client
        ticket.record = record
        self._do(record, self.dispatcher.place)
        refusal = self.dispatcher.hopeless(record)
        if refusal is not None:
            ticket.cancel()
            raise self._overloaded(refusal)
        if errors:
            raise errors[0]
        ticket.on_error = on_error
        return ticket

    def explain(self, name: str, tenant: str | None) -> Explanation:
        record, now = self.dispatcher.decisions, self._clock.now()
        found = [it for it in record.find(name) if tenant in (None, it.request.tenant)]
        if not found:
            raise RequestRejected(
                f"This frontend keeps no request `{name[:MAX_SHOWN_NAME]}`: another one may have served it,"
                f" or it never came to a choice of workers. What is kept here: {record.reach_words(now)}.",
                kind=Rejection.NOT_FOUND,
                code="request_not_found",
            )
        return Explanation(name, [self.explained(it) for it in found])

    def misses(self, last_s: float) -> tuple[MissReport, Sequence[RoutedRequest]]:
        now, record = self._clock.now(), self.dispatcher.decisions
        distrusted = {it: str(cause) for it, cause in self.placement.overlap_check.causes.items()}
        since, policy = now - last_s, self._settings.policy
        return MissReport(since, policy, time.time() - now, record.lost, distrusted), list(record)

    def foresee(self, request: Request) -> ExplainedRequest:
        routed = self.dispatcher.foresee(request, self._clock.now())
        return explained(routed, self._settings.policy, None)

    def explained(self, routed: RoutedRequest) -> ExplainedRequest:
        """What is kept of a request, as it is told."""
        return explained(routed, self._settings.policy, time.time() - self._clock.now())

    def record(self, wanted: RecordingWanted, tenant: str | None, on_more: Callable[[], None]) -> Recording:
        recordings = self.dispatcher.recordings
        if len(recordings) >= MAX_RECORDINGS:
            message = f"{len(recordings)} recordings are going on, which are the most at one time."
            raise RequestRejected(message, kind=Rejection.OVERLOADED)
        now = self._clock.now()
        recordings.append(Recording(wanted, tenant, now, time.time() - now, on_more))
        return recordings[-1]

    def stop_recording(self, recording: Recording) -> None:
        self.dispatcher.recordings.remove(recording)

    def check(self, model: str, tenant: str, priority: int) -> None:
        refusal = self.dispatcher.refusal(self.model(model).key, tenant, priority, self._clock.now())
        if refusal is not None:
            raise self._overloaded(refusal)

    def _overloaded(self, refusal: Refusal) -> RequestRejected:
        self._metrics.rejected(refusal.reason)
        return RequestRejected(str(refusal), kind=Rejection.OVERLOADED, retry_after_s=refusal.retry_after_s)

    def queues(self) -> list[QueueView]:
        """What waits here for the revision of each model that new requests get, for /metrics."""
        return [
            QueueView(model.name, len(queue), queue.saturation_ms())
            for model, queue in self.dispatcher.queues.items()
            if self.served_models.serves_revision(model)
        ]

    # --- the loop ---------------------------------------------------------------------------------

    async def run(self, prepare: Prepare | None = None) -> None:
        """Follow discovery and watch deadlines until cancelled. No request goes to a model's first worker
        before `prepare` is done with the model."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._tick_forever())
            await self.fleet.run(prepare or _ready)

    async def _tick_forever(self) -> None:
        while True:
            await self._clock.sleep(self._settings.tick_s)
            try:
                self._tick()
            except Exception:  # noqa: BLE001 logged; it is no request's and no link's, and the next tick goes on
                quiet.exception("a tick was not finished")

    def _tick(self) -> None:
        self.fleet.tick()
        now = self._clock.now()
        for record in self.dispatcher.due(now):
            self._do(record, self.dispatcher.tick)
        self._place(self.dispatcher.turns(now))
        self.placement.index.sweep()
        self._tell_verdicts()
        self._forget_models()

    def _tell_verdicts(self) -> None:
        """Say whose cache events are not believed any more, or again."""
        for instance_id, verdict in self.placement.verdicts():
            level = logging.INFO if verdict.cause is None else logging.WARNING
            log.log(level, "kv overlap check: %s: %s", instance_id, verdict)

    def _forget_models(self) -> None:
        """Keep nothing of revisions that were replaced, nor of models that nobody serves any more."""
        for model in self.dispatcher.unused_queues():
            if self.served_models.serves_revision(model):
                continue
            del self.dispatcher.queues[model]
            if not self.served_models.serves(model.name):
                self.placement.forget_model(model.name)
                self._metrics.model_gone(model.name)

    # --- requests ---------------------------------------------------------------------------------

    def handle(self, record: RequestRecord, event: Event) -> None:
        """Something has happened to a request."""
        self._do(record, self.dispatcher.handle, event)

    def _place(self, records: Iterable[RequestRecord]) -> None:
        for record in records:
            self._do(record, self.dispatcher.place)

    def _do(self, record: RequestRecord, step: Callable[..., list[Effect]], *args: Event) -> None:
        """Take one step of one request."""
        try:
            self._perform(record, step(record, *args, self._clock.now()))
        except Exception:  # noqa: BLE001 logged; a defect met with one request ends that one alone
            self._break(record)

    def _break(self, record: RequestRecord) -> None:
        """End a request that met an error of ours, whatever state that left it in."""
        ticket: Ticket = record.client
        log.exception("request %s ends because of an error in this process", record.request_id)
        if ticket.broken:
            return
        ticket.broken = True
        self.handle(record, ClientGone())
        self.dispatcher.drop(record)
        self._fail(record, RequestRejected("Internal error.", kind=Rejection.INTERNAL))

    def _perform(self, record: RequestRecord, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case DeliverOutput():  # comes with every token: a pattern that binds costs more
                    if record.life.phase is not Phase.DONE or effect.delta.finish_reason is not None:
                        record.client.on_delta(effect.delta)  # else what came before it has failed
                case SendAttempt(instance_id, attempt):
                    self.send(record, instance_id, attempt)
                case CancelAttempt(instance_id, attempt_id):
                    self._tell(instance_id, partial(LinkClient.cancel, attempt_id=attempt_id))
                case ReleaseKv(instance_id, handoff_id, sent):
                    self._tell(instance_id, partial(LinkClient.release, handoff_id=handoff_id, sent=sent))
                case NoteChoice():
                    self._note(record, effect)
                case FailRequest(error):
                    self._fail(record, error)

    def send(self, record: RequestRecord, instance_id: str, attempt: Attempt) -> None:
        """Send an attempt of a request."""
        link = self.fleet.link(instance_id)
        if link is None:
            self.handle(record, InstanceLost(instance_id, "no longer known"))
            return
        try:
            seq = link.generate(attempt)
        except ProtocolError as error:
            self.handle(record, TooLong(attempt.attempt_id, str(error)))
        except RemoteError as error:  # its link is full, or just broke: nothing was lost there
            self.dispatcher.refused(instance_id, self._clock.now() + self._settings.tick_s)
            self.handle(record, Bounced(attempt.attempt_id, str(error), unsent=True))
        else:
            self.dispatcher.sent(record, instance_id, seq, attempt, self._clock.now())

    def _tell(self, instance_id: str, message: Callable[[LinkClient], None]) -> None:
        """Say something that loses its meaning when the instance is gone."""
        link = self.fleet.link(instance_id)
        if link is not None and link.up:
            message(link)

    def _note(self, record: RequestRecord, choice: NoteChoice) -> None:
        request_id, decision = record.request_id, choice.decision
        if choice.failed:
            self._metrics.retried()
            words = "request %s: trying again after %d tokens: %s"
            log.info(words, request_id, record.life.output_tokens, choice.failed)
        self._metrics.waited(choice.waited_s)
        self._metrics.decided(self._settings.policy, decision.path)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s", explain(request_id, decision, choice.avoided))

    def _fail(self, record: RequestRecord, error: RequestRejected) -> None:
        ticket: Ticket = record.client
        if error.code == KILLER:
            what = f"{record.life.strikes.describe()} prompt_tokens={len(record.life.request.token_ids)}"
            log.error("request %s kills workers, and is stopped: %s", record.request_id, what)
        try:
            ticket.on_error(error)
        except Exception:  # its own defect; there is nothing left to end
            log.exception("request %s: its error could not be delivered", record.request_id)

    # --- what instances say: implements Listener ---------------------------------------------------------

    def on_ready(self, instance_id: str) -> None:
        self.dispatcher.ready(instance_id)
        self._place(self.dispatcher.turns(self._clock.now()))

    def on_outputs(self, instance_id: str, role: Role, outputs: list[Output]) -> None:
        now, find = self._clock.now(), self.dispatcher.attempts.get
        for output in outputs:
            record = find(output.attempt_id)
            if record is not None:
                try:
                    if output.cached_tokens is not None:
                        self._compare(record, instance_id, output)
                    if output.finish_reason is not None:
                        self._metrics.attempt_ended(role, output.finish_reason)
                    self._perform(record, self.dispatcher.output(record, output, now))
                except Exception:  # noqa: BLE001 as in `_do`, without a call for each token
                    self._break(record)
                continue
            # Its request ended meanwhile.
            if output.took is not None:
                self.dispatcher.decisions.late(output.attempt_id, output.took)
            if output.handoff is not None:
                handoff_id = output.handoff.handoff_id
                self._tell(instance_id, partial(LinkClient.release, handoff_id=handoff_id, sent=False))
        self._place(self.dispatcher.turns_after_report(now))

    def on_bounce(self, instance_id: str, role: Role, bounce: Bounce) -> None:
        self._metrics.bounced(role)
        self.dispatcher.refused(instance_id, self._clock.now() + bounce.retry_after_s)
        record = self.dispatcher.attempts.get(bounce.attempt_id)
        if record is not None:
            self.handle(record, Bounced(bounce.attempt_id, bounce.reason))

    def on_lost(
        self, instance_id: str, role: Role, reason: str, requests: int, died: Incarnation | None
    ) -> None:
        for record, event in self.dispatcher.lost(instance_id, reason, requests, died, self._clock.now()):
            if record.life.instance_id == instance_id:
                self._metrics.attempt_ended(role, "lost")
            self.handle(record, event)

    def on_stuck(self, instance_id: str, reason: str) -> None:
        for record, event in self.dispatcher.stuck(instance_id, reason):
            self.handle(record, event)

    def _compare(self, record: RequestRecord, instance_id: str, output: Output) -> None:
        """Hold the predicted overlap against what the engine found cached (invariant 9)."""
        assert output.cached_tokens is not None
        if output.transferred_blocks:
            self._metrics.transferred(output.transferred_blocks)
        predicted = self.placement.cached(
            record.placed, instance_id, output.cached_tokens, output.transferred_blocks
        )
        if predicted is not None:
            self._metrics.overlap(predicted, output.cached_tokens)


async def _ready(model: ModelView) -> None:
    """Nothing to prepare."""
