"""The router: serves requests over all instances that discovery shows.

A shell. It decides nothing itself: `instances.py` keeps a link to every instance and says which take part,
`core/admission.py` whose turn it is, `core/policy.py` which instance gets the request, and
`core/lifecycle.py` what happens to it next. All of it runs on one event loop; every callback below finishes
without awaiting.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from functools import partial

from penstock.clock import Clock, MonotonicClock
from penstock.core import events as life
from penstock.core.admission import Queue, Refusal, work_tokens
from penstock.core.lifecycle import Lifecycle, Phase
from penstock.core.membership import decoders
from penstock.core.placement import Placed, Placement, explain
from penstock.core.policy import Decision, Path
from penstock.core.progress import PatientTime
from penstock.core.queues import Queues
from penstock.core.room import waiting_bytes
from penstock.core.settings import RouterSettings
from penstock.core.suspects import CONFIRM_S, HOLD_S, PRIME, Suspects, alone_from
from penstock.errors import ModelReplaced, ProtocolError, Rejection, RemoteError, RequestRejected
from penstock.link.client import LinkClient
from penstock.link.settings import ClientSettings
from penstock.logs.quiet_log import QuietLog
from penstock.metrics import QueueView, RouterMetrics
from penstock.ports import Discovery
from penstock.router.instances import Instances, Prepare
from penstock.router.live import Live, OnDelta, OnError
from penstock.shapes import Attempt, Card, InstanceView, Load, ModelView, Output, Request, Role
from penstock.wire.messages import Bounce

log = logging.getLogger("penstock.router")
quiet = QuietLog(log)


class Ticket:
    """A submitted request, for whoever may want to end it early."""

    __slots__ = ("_live", "_router")

    def __init__(self, router: Router, live: Live) -> None:
        self._router = router
        self._live = live

    def cancel(self, *, complete: bool = False) -> None:
        """Nobody wants the rest: no further callbacks, and the engine stops. `complete`: because the answer
        ends here, not because its reader left. Idempotent."""
        self._router._event(self._live, life.ClientGone(complete))


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
        self._settings = settings
        self._metrics = metrics
        self._clock = clock or MonotonicClock()
        self._rng = rng or random.Random()
        self._placement = Placement(
            settings.policy, settings.disagg, self._rng, settings.admission.max_itl_ms
        )
        self._instances = Instances(
            discovery,
            self._placement,
            link_settings,
            metrics,
            self._clock,
            self._rng,
            self,
            frontend_id=frontend_id,
            load_retry_s=settings.load_retry_s,
            outage_s=settings.deadlines.queue_s,
            progress=settings.progress,
            tick_s=settings.tick_s,
        )
        self._live: dict[str, Live] = {}
        self._attempts: dict[str, Live] = {}  # by the id of each attempt of these that was sent
        self._queues = Queues(settings.admission, self._rng)
        self._resting: dict[str, Live] = {}  # requests that must not ask for a worker before the next tick
        self._full_until: dict[str, float] = {}  # instances that refused an attempt
        self._looked_at = 0.0
        self._patient = PatientTime(self._clock.now(), settings.tick_s)
        metrics.queues_from(self.queues)
        self._suspects = Suspects()

    # --- for the frontend -------------------------------------------------------------------------

    def models(self) -> list[ModelView]:
        """Models that some ready instance serves."""
        return self._instances.models()

    def model(self, name: str) -> ModelView:
        """The model in the revision that new requests get. Raises RequestRejected: NOT_FOUND
        for a model never seen, UNAVAILABLE for one that no worker has served for as long as a request may
        queue."""
        return self._instances.model(name)

    def instances(self) -> list[InstanceView]:
        """All known instances, for /health."""
        return self._instances.views()

    def healthy(self) -> tuple[bool, str]:
        """Whether every role the graph needs is connected; else which is missing."""
        missing = self._instances.membership.missing(self._settings.expect)
        return not missing, ", ".join(missing)

    def discovery(self) -> str:
        """Why there may be instances that are not known here; empty when there are none."""
        return self._instances.discovery()

    def submit(self, request: Request, on_delta: OnDelta, on_error: OnError) -> Ticket:
        """Serve a request. `on_delta` gets its output, step by step, the last with a finish_reason; or
        `on_error` is called once. Raises RequestRejected(OVERLOADED) when it would have to wait too long.
        The choices of a call must be submitted one directly after the other."""
        queue = self._queues.of(request.model, request.revision)
        size = waiting_bytes(request)
        if not queue.holds(request.call_id, request.tenant, request.priority):
            self._check(queue, request.tenant, request.priority, size)
        lifecycle = Lifecycle(request, self._settings.deadlines, self._clock.now() - request.age_s)
        live = Live(lifecycle, on_delta, on_error, Placed(request), queue)
        names = request.request_id, request.call_id, request.tenant
        queue.enter(*names, request.priority, self._work(live), self._patience(), size)
        self._live[request.request_id] = live
        self._event(live, life.Retry())
        refusal = queue.hopeless(request.request_id)
        if refusal is not None:
            self._event(live, life.Refused(self._rejected(refusal)))
        return Ticket(self, live)

    def queues(self) -> list[QueueView]:
        """What waits here for the revision of each model that new requests get, for /metrics."""
        return [
            QueueView(model, len(queue), queue.saturation_ms())
            for (model, revision), queue in self._queues.items()
            if self._instances.serves(model, revision)
        ]

    def check(self, model: str, tenant: str, priority: int) -> None:
        """Raises RequestRejected(OVERLOADED) when any request would have to wait too long."""
        queue = self._queues.get((model, self.model(model).revision))
        if queue is not None:
            self._check(queue, tenant, priority)

    def _check(self, queue: Queue, tenant: str, priority: int, size: int = 0) -> None:
        refusal = queue.refusal(tenant, priority, self._patience(), size=size)
        if refusal is not None:
            raise self._rejected(refusal)

    # --- the loop ---------------------------------------------------------------------------------

    async def run(self, prepare: Prepare | None = None) -> None:
        """Follow discovery and watch deadlines until cancelled. No request goes to a model's first worker
        before `prepare` is done with the model."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._tick_forever())
            await self._instances.run(prepare or _ready)

    async def _tick_forever(self) -> None:
        while True:
            await self._clock.sleep(self._settings.tick_s)
            try:
                self._tick()
            except Exception:  # noqa: BLE001 logged; it is no request's and no link's, and the next tick goes on
                quiet.exception("a tick was not finished")

    def _tick(self) -> None:
        self._instances.tick()
        now = self._clock.now()
        for live in [live for live in self._live.values() if live.lifecycle.deadline <= now]:
            self._event(live, life.Tick(queued=self._waits_in_a_queue(live)))
        resting, self._resting = self._resting, {}
        for request_id, live in resting.items():
            self._event(live, life.Retry())
            if live.lifecycle.phase is Phase.QUEUED and request_id not in live.queue:
                self._resting[request_id] = live
        self._look(now)
        self._placement.tick()
        self._forget_models()

    def _waits_in_a_queue(self, live: Live) -> bool:
        """Whether its instance gets on with its work, and has more than it can do at once."""
        instance_id, _ = live.lifecycle.places
        return self._instances.advances(instance_id) and self._placement.load(instance_id).waiting > 0

    # --- the queues -------------------------------------------------------------------------------

    def _forget_models(self) -> None:
        """Keep nothing of revisions that were replaced, nor of models that nobody serves any more."""
        for model, revision in [key for key in self._queues if not self._instances.serves(*key)]:
            if any(live.queue is self._queues[model, revision] for live in self._live.values()):
                continue
            del self._queues[model, revision]
            if not self._instances.serves(model):
                self._placement.forget_model(model)
                self._metrics.model_gone(model)

    def _look(self, now: float) -> None:
        """Let those go whose turn has come."""
        self._looked_at = now
        for queue in list(self._queues.values()):
            while (request_id := queue.next()) is not None:
                self._event(self._live[request_id], life.Retry())
                if queue.next() == request_id:
                    break

    def _patience(self) -> float:
        """Time as queues measure it: while this process stood still, no worker was slow."""
        return self._patient.look(self._clock.now())

    def _work(self, live: Live) -> float:
        """What is left of it, in tokens (core/admission.py)."""
        expected = self._placement.expected_output_tokens(live.placed.request) - live.given
        return work_tokens(len(live.lifecycle.token_ids), max(0.0, expected))

    def _rejected(self, refusal: Refusal) -> RequestRejected:
        self._metrics.rejected(refusal.reason)
        return RequestRejected(str(refusal), kind=Rejection.OVERLOADED, retry_after_s=refusal.retry_after_s)

    # --- requests ---------------------------------------------------------------------------------

    def _event(self, live: Live, event: life.Event) -> None:
        try:
            self._perform(live, live.lifecycle.handle(event, self._clock.now()))
        except Exception:  # noqa: BLE001 logged; a defect met with one request ends that one alone
            self._break(live)

    def _break(self, live: Live) -> None:
        """End a request that met an error of ours, whatever state that left it in."""
        request_id = live.placed.request.request_id
        log.exception("request %s ends because of an error here", request_id)
        if live.broken:
            return
        live.broken = True
        self._event(live, life.ClientGone())
        self._forget(live, request_id)
        self._resting.pop(request_id, None)
        self._placement.unbook(live.placed)
        self._suspects.note(request_id, 0, ())
        self._fail(live, RequestRejected("Internal error.", kind=Rejection.INTERNAL))

    def _perform(self, live: Live, effects: list[life.Effect]) -> None:
        for effect in effects:
            match effect:
                case life.Emit():  # comes with every token: a pattern that binds costs more
                    if live.filed is not Phase.DONE:  # what came before it may have ended in an error
                        live.on_delta(effect.delta)
                case life.Choose() as wanted:
                    self._event(live, self._choose(live, wanted))
                case life.Send(instance_id, attempt):
                    unsent = self._send(live, instance_id, attempt)
                    if unsent is not None:
                        self._event(live, unsent)
                        self._file(live)  # it may rest in the phase that it was filed in before
                case life.Cancel(instance_id, attempt_id):
                    self._tell(instance_id, partial(LinkClient.cancel, attempt_id=attempt_id))
                case life.Release(instance_id, handoff_id, sent):
                    self._tell(instance_id, partial(LinkClient.release, handoff_id=handoff_id, sent=sent))
                case life.Fail(error):
                    self._fail(live, error)
        if live.filed is not live.lifecycle.phase:
            self._file(live)
        if live.suspect or live.lifecycle.strikes.count:
            self._note(live)

    def _note(self, live: Live) -> None:
        """Keep the suspects up to date."""
        lifecycle = live.lifecycle
        live.suspect = lifecycle.strikes.count > 0 and lifecycle.phase is not Phase.DONE
        self._suspects.note(
            lifecycle.request.request_id, lifecycle.strikes.count if live.suspect else 0, lifecycle.places
        )

    def _fail(self, live: Live, error: RequestRejected) -> None:
        if error.code == life.KILLER:
            strikes, request = live.lifecycle.strikes, live.placed.request
            what = f"{strikes.describe()} prompt_tokens={len(request.token_ids)}"
            log.error("request %s kills workers, and is stopped: %s", request.request_id, what)
        try:
            live.on_error(error)
        except Exception:  # its own defect; there is nothing left to end
            log.exception("request %s: its error could not be delivered", live.placed.request.request_id)

    def _file(self, live: Live) -> None:
        """Keep the books by phase."""
        live.filed = live.lifecycle.phase
        request_id = live.lifecycle.request.request_id
        if live.lifecycle.phase is Phase.QUEUED:
            self._placement.unbook(live.placed)
            if request_id not in live.queue:
                self._resting[request_id] = live
        if live.lifecycle.phase is Phase.DONE and request_id in self._live:
            self._forget(live, request_id)
            self._placement.ended(live.placed, live.given if live.lifecycle.complete else None)

    def _forget(self, live: Live, request_id: str) -> None:
        """Nothing more comes of it."""
        self._live.pop(request_id, None)
        for attempt_id in live.attempt_ids:
            self._attempts.pop(attempt_id, None)
        live.queue.leave(request_id)

    def _choose(
        self, live: Live, wanted: life.Choose
    ) -> life.Chosen | life.NoCandidate | life.Held | life.Refused:
        queue, now, request = live.queue, self._patience(), live.lifecycle.request
        request_id = request.request_id
        if failed := wanted.failed:
            self._metrics.retried()
            log.info("request %s: trying again after %d tokens: %s", request_id, live.given, failed)
        everybody = self._instances.membership.ready(request.model, request.revision)
        workers = decoders(everybody)
        if not workers and self._instances.membership.replaced(request.model, request.revision):
            return self._without_its_revision(live)
        if request_id not in queue:  # it was sent before
            queue.back(request_id, self._work(live), now, waiting_bytes(request))
        if not queue.turn(request_id):
            return life.Held()
        ready = [card for card in everybody if card.instance_id not in wanted.avoid]
        apart = self._keep_apart(live, ready)
        decision = self._decide(live, wanted, apart)
        if not live.lifecycle.strikes.count and len(apart) < len(ready) and not live.fits(decision):
            apart, decision = ready, self._decide(live, wanted, ready)  # rather beside a suspect than not
        if ready and decoders(apart) < workers and not live.fits(decision):
            return self._rest(live)
        if decision is None:
            if decoders(ready):
                queue.hold(request_id, now)
                return life.Held()
            if not workers:
                queue.nobody()
            return life.NoCandidate(f"no worker is ready to decode for {request.model}")
        if not queue.may_go(request_id, decision.wait_ms, workers, now, crowded=decision.crowded):
            if not queue.knows_pace:
                work = self._work(live)
                queue.guess(self._placement.service_ms(request, decision, everybody) / work, work)
            return life.Held()
        self._placement.book(live.placed, decision, live.lifecycle.token_ids)
        self._metrics.waited(queue.take(request_id, now))
        self._metrics.decided(self._settings.policy, decision.path)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s", explain(request_id, decision, wanted.avoid))
        return life.Chosen(decision.decode, decision.prefill, decision.path is not Path.REMOTE)

    def _rest(self, live: Live) -> life.Held:
        """Others may go where it must not: it waits without standing in their way."""
        live.queue.leave(live.lifecycle.request.request_id)
        self._resting[live.lifecycle.request.request_id] = live
        return life.Held()

    def _without_its_revision(self, live: Live) -> life.Held | life.Refused:
        """It waits for workers of its revision that may return, if it has tokens already. Otherwise it had
        better be tokenized for the revision that is served."""
        request = live.lifecycle.request
        if not live.given or not self._instances.membership.may_return(request.model, request.revision):
            return life.Refused(ModelReplaced(request.model))
        return self._rest(live)

    def _decide(self, live: Live, wanted: life.Choose, cards: list[Card]) -> Decision | None:
        now = self._clock.now()
        cards = [card for card in cards if self._full_until.get(card.instance_id, now) <= now]
        return self._placement.choose(live.placed, live.lifecycle.token_ids, cards, wanted.handoff)

    def _keep_apart(self, live: Live, cards: list[Card]) -> list[Card]:
        """Where it may run, for all that is known of who kills engines."""
        strikes, request_id = live.lifecycle.strikes, live.placed.request.request_id
        waited_s = live.lifecycle.waited_s(self._clock.now())
        if strikes.deaths >= PRIME and waited_s < live.confirm_s:
            return []
        if strikes.count < PRIME:
            return self._suspects.apart(request_id, strikes.count, cards)
        told = {card.instance_id: self._placement.load(card.instance_id).suspects for card in cards}
        return self._suspects.apart(request_id, strikes.count, cards, told, held=waited_s >= HOLD_S)

    def _send(self, live: Live, instance_id: str, attempt: Attempt) -> life.Event | None:
        """Send and book an attempt. Returns what became of it if it could not be sent."""
        link = self._instances.link(instance_id)
        if link is None:
            return life.InstanceLost(instance_id, "no longer known")
        try:
            seq = link.generate(attempt)
        except ProtocolError as error:
            return life.TooLong(attempt.attempt_id, str(error))
        except RemoteError as error:  # its link is full, or just broke: nothing was lost there
            self._full_until[instance_id] = self._clock.now() + self._settings.tick_s
            return life.Bounced(attempt.attempt_id, str(error), unsent=True)
        live.attempt_ids.append(attempt.attempt_id)
        self._attempts[attempt.attempt_id] = live
        self._placement.sent(live.placed, instance_id, seq, attempt)
        return None

    def _tell(self, instance_id: str, message: Callable[[LinkClient], None]) -> None:
        """Say something that loses its meaning when the instance is gone."""
        link = self._instances.link(instance_id)
        if link is not None and link.up:
            message(link)

    # --- what instances say: implements Listener ---------------------------------------------------------

    def on_ready(self, instance_id: str) -> None:
        for live in [live for live in self._live.values() if live.lifecycle.avoids(instance_id)]:
            self._event(live, life.InstanceReady(instance_id))
        self._look(self._clock.now())

    def on_outputs(self, instance_id: str, role: Role, outputs: list[Output]) -> None:
        now = self._clock.now()
        for output in outputs:
            live = self._attempts.get(output.attempt_id)
            if live is not None:
                try:
                    if output.cached_tokens is not None:
                        self._compare(live, instance_id, output)
                    if output.finish_reason is not None:
                        self._metrics.attempt_ended(role, output.finish_reason)
                    self._perform(live, live.lifecycle.handle(output, now))
                except Exception:  # noqa: BLE001 as in `_event`, without a call for each token
                    self._break(live)
            elif output.handoff is not None:  # its request ended meanwhile
                handoff_id = output.handoff.handoff_id
                self._tell(instance_id, partial(LinkClient.release, handoff_id=handoff_id, sent=False))
        if now - self._looked_at >= self._settings.look_s:
            self._look(now)

    def on_bounce(self, instance_id: str, role: Role, bounce: Bounce) -> None:
        self._metrics.bounced(role)
        self._full_until[instance_id] = self._clock.now() + bounce.retry_after_s
        live = self._attempts.get(bounce.attempt_id)
        if live is not None:
            self._event(live, life.Bounced(bounce.attempt_id, bounce.reason))

    def on_lost(self, instance_id: str, role: Role, reason: str, load: Load, died: str) -> None:
        self._full_until.pop(instance_id, None)
        lives = [live for live in self._live.values() if live.lifecycle.concerns(instance_id)]
        on_it = [live for live in lives if live.lifecycle.places[0] == instance_id]
        connected = self._instances.membership.incarnations()
        for live in on_it:
            self._metrics.attempt_ended(role, "lost")
            live.lifecycle.strikes.survived(connected)
            live.confirm_s = CONFIRM_S * self._rng.uniform(1.0, 2.0)
        least = alone_from([live.lifecycle.strikes.deaths for live in on_it], load)
        for live in lives:
            alone = live.lifecycle.strikes.deaths >= least
            self._event(live, life.InstanceLost(instance_id, reason, died, alone))

    def on_stuck(self, instance_id: str, reason: str) -> None:
        """Whoever can be served elsewhere goes there; for the others, waiting is all that is left. What is
        still prefilled elsewhere must not be sent here afterwards, and is placed anew by then."""
        ready = self._instances.membership.ready
        for live in list(self._live.values()):
            places, request = live.lifecycle.places, live.placed.request
            if instance_id in places and (
                places[0] != instance_id or decoders(ready(request.model, request.revision))
            ):
                self._event(live, life.InstanceStuck(instance_id, reason))

    def on_revision(self, model: str) -> None:
        for live in list(self._live.values()):
            if live.lifecycle.phase is Phase.QUEUED and live.lifecycle.request.model == model:
                self._event(live, life.Retry())

    def _compare(self, live: Live, instance_id: str, output: Output) -> None:
        """Hold the predicted overlap against what the engine found cached (invariant 9)."""
        assert output.cached_tokens is not None
        if output.transferred_blocks:
            self._metrics.transferred(output.transferred_blocks)
        found = self._placement.cached(live.placed, instance_id, output.cached_tokens)
        if found is None:
            return
        predicted, verdict = found
        self._metrics.overlap(predicted, output.cached_tokens)
        if verdict is not None:
            log.warning("kv overlap check: %s: %s", instance_id, verdict)


async def _ready(model: ModelView) -> None:
    """Nothing to prepare."""
