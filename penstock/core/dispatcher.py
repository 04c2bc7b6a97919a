"""What a frontend does with its requests: which goes when to which worker, and what each event means.

Theory. There is one record per request. Its state machine (core/lifecycle.py) knows what an event means to
its attempts; this module adds what concerns all requests together: whose turn it is (core/admission.py),
which instances may take a request (core/membership.py, core/suspects.py) and which one does
(core/placement.py), and keeps the books of these up to date with it. Pure: events in, effects out.

    phase of the record  event                       what happens
    -------------------  --------------------------  ------------------------------------------------------
    (none)               `submit`                    QUEUED, in the queue; or a Refusal
    QUEUED, in queue     `place`: its turn, or it    on an instance, when some could begin it soon; else it
                         has just come               waits on
    QUEUED, in queue     `place`, and only suspects  QUEUED, resting: others may go where it must not
                         are where it could go
    QUEUED               `place`, and its revision   DONE, failed; QUEUED, resting, if it has tokens and
                         was replaced                such a worker may return
    QUEUED, resting      `tick`, its rest is over    back at the head of the queue, and as `place`
    on an instance       its attempt ended early     QUEUED: resting after repeated losses; else at the
                                                     head of the queue, and as `place`
    on an instance       its answer is complete      DONE
    any                  `tick`, a deadline is over  as in core/lifecycle.py
    any                  ClientGone                  DONE

A record is QUEUED exactly while no instance has it. It is then in its queue, or `resting` until a tick. The
queue of a DONE record, and all other books, have forgotten it.

Every call that returns effects concerns one record, and the caller carries out its effects before the next
call. So a record whose handling raises can be dropped (`drop`) without harm to the others. What happens to
many records at once (an instance is lost) is given as the event for each of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from penstock.core.admission import AdmissionQueue, AdmissionQueues, waiting_bytes, work_tokens
from penstock.core.deadlines import Phase
from penstock.core.decision_record import (
    DecisionRecord,
    Holder,
    PassedOver,
    Placing,
    RequestFacts,
    RoutedRequest,
)
from penstock.core.disagg import Disagg
from penstock.core.events import (
    DeliverOutput,
    Effect,
    Event,
    FailRequest,
    InstanceLost,
    InstanceStuck,
    NoteChoice,
)
from penstock.core.lifecycle import Lifecycle
from penstock.core.membership import Membership, decoders
from penstock.core.pairing import kv_format
from penstock.core.placement import Placed, Placement
from penstock.core.policy import Decision, Path
from penstock.core.progress import PatientTime
from penstock.core.recording import Recording
from penstock.core.settings import RouterSettings
from penstock.core.suspects import HOLD_S, Suspects, alone_from
from penstock.core.wait_prediction import Refusal
from penstock.errors import ModelReplaced
from penstock.shapes import Attempt, Card, Incarnation, ModelKey, Output, Request


@dataclass(slots=True, eq=False)
class RequestRecord:
    """One request that has been submitted and has not ended."""

    life: Lifecycle
    placed: Placed  # placement's part of it
    queue: AdmissionQueue  # of its model's revision
    client: Any  # of whoever submitted it; the dispatcher only keeps it
    routed: RoutedRequest  # what is kept of it for later
    resting: bool = False  # it is QUEUED, and not in the queue

    @property
    def request_id(self) -> str:
        return self.life.request.request_id

    def fits(self, decision: Decision | None) -> bool:
        """Whether it would be sent now."""
        return decision is not None and self.queue.fits(self.request_id, decision.wait_ms)


class Dispatcher:
    """All requests of a frontend. `now` in seconds, of one clock."""

    def __init__(
        self,
        settings: RouterSettings,
        membership: Membership,
        placement: Placement,
        rng: Random,
        now: float,
    ) -> None:
        self.records: dict[str, RequestRecord] = {}  # by request id
        self.attempts: dict[str, RequestRecord] = {}  # by the id of each attempt of those that was sent
        self.queues = AdmissionQueues(settings.admission, rng)
        self.suspects = Suspects()
        self.decisions = DecisionRecord()
        self.recordings: list[Recording] = []  # that are going on
        self.full_until: dict[str, float] = {}  # instances that refused an attempt
        self._settings = settings
        self._membership = membership
        self._placement = placement
        self._rng = rng
        self._patient = PatientTime(now, settings.tick_s)
        self._looked_at = now

    # --- a request comes ------------------------------------------------------------------------------

    def submit(self, request: Request, client: Any, now: float) -> RequestRecord | Refusal:
        """Let a request into its queue; `place` and then `hopeless` must follow. A Refusal when it would
        have to wait too long. The choices of a call must be submitted one directly after the other."""
        queue = self.queues.of(request.model)
        size = waiting_bytes(request)
        patience = self._patient.look(now)
        refusal = queue.refusal(
            request.tenant, request.priority, patience, call_id=request.call_id, size=size
        )
        if refusal is not None:
            return refusal
        wait_ms = queue.expected_wait_ms(request.tenant, request.priority, patience)
        life = Lifecycle(request, self._settings.deadlines, now - request.age_s)
        routed = self.decisions.came(request, life.history, now - request.age_s, wait_ms)
        record = RequestRecord(life, Placed(request), queue, client, routed)
        queue.enter(request, self._work(record), patience)
        self.records[request.request_id] = record
        return record

    def refusal(self, model: ModelKey, tenant: str, priority: int, now: float) -> Refusal | None:
        """Why a request would be refused, whatever it asks; None when it would be let in."""
        queue = self.queues.get(model)
        return queue.refusal(tenant, priority, self._patient.look(now)) if queue is not None else None

    def foresee(self, request: Request, now: float) -> RoutedRequest:
        """What would be kept of a request that came now, with the decision for it if workers could take it.
        Nothing changes by it, neither here nor in what is decided next."""
        placed, queue = Placed(request), self.queues.get(request.model)
        placed.others_waiting = len(queue) if queue is not None else 0
        everybody = self._membership.ready(request.model)
        apart = self.suspects.apart(0, everybody)
        decision = self._placement.foresee(placed, request.token_ids, self._not_full(apart, now), now)
        wait_ms = 0.0
        if queue is not None:
            wait_ms = queue.expected_wait_ms(request.tenant, request.priority, self._patient.seconds)
        if decision is not None:  # it is sent once a worker could begin it soon
            wait_ms = max(wait_ms, decision.wait_ms - self._settings.admission.dispatch_wait_ms)
        routed = RoutedRequest(RequestFacts.of(request), now, wait_ms, ())
        if decision is not None:
            cause: tuple[str, frozenset[str], int] = ("", frozenset(), 0)
            routed.keep(self._placing(placed, decision, 0.0, cause, everybody, apart, now))
        return routed

    def hopeless(self, record: RequestRecord) -> Refusal | None:
        """Why a newcomer is refused after `place` has found out how long the workers' wait is."""
        return record.queue.hopeless(record.request_id)

    # --- what happens to one request ------------------------------------------------------------------

    def handle(self, record: RequestRecord, event: Event, now: float) -> list[Effect]:
        """Any event of one request."""
        before = record.life.phase
        return self._follow(record, before, record.life.handle(event, now), now)

    def output(self, record: RequestRecord, output: Output, now: float) -> list[Effect]:
        """`handle` for an output: one comes with every token, and the books change with few of them."""
        life = record.life
        before, struck = life.phase, life.strikes.count
        effects = life.on_output(output, now)
        if output.finish_reason is not None or struck:
            return self._follow(record, before, effects, now)
        return effects

    def place(self, record: RequestRecord, now: float) -> list[Effect]:
        """Send a queued request if it is its turn and some instance could begin it soon."""
        before = record.life.phase
        return self._follow(record, before, self._place(record, now), now)

    def tick(self, record: RequestRecord, now: float) -> list[Effect]:
        """Its deadline or its rest may be over."""
        before, life = record.life.phase, record.life
        effects = life.tick(now)
        if record.resting:
            effects = [*effects, *self._place(record, now)]
        return self._follow(record, before, effects, now)

    def sent(self, record: RequestRecord, instance_id: str, seq: int, attempt: Attempt, now: float) -> None:
        """Its attempt left, as number `seq` on the link to the instance."""
        self.attempts[attempt.attempt_id] = record
        self._placement.sent(record.placed, instance_id, seq, attempt, now)

    def drop(self, record: RequestRecord) -> None:
        """Forget a request, whatever state it is in."""
        life, request_id = record.life, record.request_id
        self.records.pop(request_id, None)
        for number in range(1, life.attempts + 1):
            self.attempts.pop(life.attempt_id_of(number), None)
        record.queue.leave(request_id)
        record.resting = False
        self.suspects.note(request_id, 0)
        self._placement.unbook(record.placed)

    def _follow(
        self, record: RequestRecord, before: Phase, effects: list[Effect], now: float
    ) -> list[Effect]:
        """Keep the books by what has become of a record that was in phase `before`. One that has lost its
        instance is placed again, if it need not rest. Returns the effects of both."""
        life = record.life
        if before is not Phase.QUEUED and life.phase is Phase.QUEUED:
            self._placement.unbook(record.placed)
            self.suspects.note(record.request_id, 0)
            record.resting = True
            rest_s = life.rests_until - now
            if rest_s > 0.0:  # and not together with those of other frontends that lost the same instance
                life.rests_until += self._rng.random() * rest_s
            placed = self._place(record, now)
            last = [effects.pop()] if effects and type(effects[-1]) is DeliverOutput else []
            effects = [*effects, *placed, *last]
        if life.phase is Phase.DONE:
            if before is not Phase.DONE:
                self.drop(record)
                self._ended(record, effects, now)
                output_tokens = life.output_tokens if life.complete else None
                self._placement.ended(record.placed, output_tokens, life.output_ids)
        elif life.strikes.count or record.request_id in self.suspects:
            places = life.instance_id, life.decode_id
            self.suspects.note(record.request_id, life.strikes.count, *places)
        return effects

    def _ended(self, record: RequestRecord, effects: list[Effect], now: float) -> None:
        error = next((str(effect.error) for effect in effects if type(effect) is FailRequest), "")
        life = record.life
        for recording in self.recordings:
            recording.ended(life.request, life.token_ids, record.routed.came_at)
        self.decisions.ended(
            record.routed, now, complete=life.complete, output_tokens=life.output_tokens, error=error
        )

    # --- what happens to many -------------------------------------------------------------------------

    def due(self, now: float) -> list[RequestRecord]:
        """Those for which `tick` must be called."""
        self._patient.look(now)
        return [it for it in self.records.values() if it.resting or it.life.deadline <= now]

    def turns(self, now: float) -> Iterator[RequestRecord]:
        """One after the other, those whose turn it is: `place` each before the next is asked for."""
        self._looked_at = now
        for queue in list(self.queues.values()):
            while (request_id := queue.next()) is not None:
                yield self.records[request_id]
                if queue.next() == request_id:
                    break

    def turns_after_report(self, now: float) -> Iterable[RequestRecord]:
        """`turns`, after a worker's report; not too often, however many workers report."""
        return self.turns(now) if now - self._looked_at >= self._settings.look_s else ()

    def ready(self, instance_id: str) -> None:
        """An instance takes attempts, anew or again: another process of that name, or an engine that goes
        on. It is not avoided any more. `turns` should follow."""
        for record in self.records.values():
            record.life.avoided.discard(instance_id)

    def refused(self, instance_id: str, until: float) -> None:
        """An instance refused an attempt, or its link is full: it should get no other one until then."""
        self.full_until[instance_id] = until

    def lost(
        self, instance_id: str, reason: str, requests: int, died: Incarnation | None, now: float
    ) -> list[tuple[RequestRecord, InstanceLost]]:
        """An instance is gone. `requests`: how many it had, whoever sent them. Returns the event for each
        request that it concerns."""
        self.full_until.pop(instance_id, None)
        self.decisions.worker_lost(instance_id, reason, now)
        records = [it for it in self.records.values() if it.life.concerns(instance_id)]
        on_it = [it.life.strikes for it in records if it.life.instance_id == instance_id]
        connected = self._membership.incarnations()
        for strikes in on_it:
            strikes.survived(connected)
        least, shared = alone_from([strikes.deaths for strikes in on_it]), requests > len(on_it)
        return [
            (it, InstanceLost(instance_id, reason, died, shared, it.life.strikes.deaths >= least))
            for it in records
        ]

    def stuck(self, instance_id: str, reason: str) -> list[tuple[RequestRecord, InstanceStuck]]:
        """The engine of an instance does not advance. Requests that can be served elsewhere leave it; the
        others can only wait. What is still prefilled elsewhere must not be sent here afterwards, and is
        placed anew by then."""
        leaving = []
        for record in self.records.values():
            life, request = record.life, record.life.request
            if life.instance_id == instance_id:
                leaves = self._membership.decoders(request.model) > 0
            else:
                leaves = life.decode_id == instance_id
            if leaves:
                leaving.append((record, InstanceStuck(instance_id, reason)))
        return leaving

    def unused_queues(self) -> list[ModelKey]:
        """The models whose queues no request needs now."""
        used = {id(record.queue) for record in self.records.values()}
        return [key for key, queue in self.queues.items() if id(queue) not in used]

    # --- placing --------------------------------------------------------------------------------------

    def _place(self, record: RequestRecord, now: float) -> list[Effect]:
        life, queue, request = record.life, record.queue, record.life.request
        if life.phase is not Phase.QUEUED or now <= life.rests_until:
            return []
        everybody = self._membership.ready(request.model)
        workers = self._membership.decoders(request.model)
        if not workers and self._membership.replaced(request.model):
            return self._without_its_revision(record)
        patience = self._patient.look(now)
        if record.resting:  # it was sent before
            record.resting = False
            queue.requeue(request, self._work(record), patience)
        if queue.next() != record.request_id:
            return []
        ready = everybody  # which is the same list until a worker changes, and so known to the placement
        if life.avoided:
            ready = [card for card in everybody if card.instance_id not in life.avoided]
        apart, decision = self._choose(record, ready, now)
        kept_away = apart is not everybody and decoders(apart) < workers
        if ready and kept_away and not record.fits(decision):
            return self._rest(record)
        if decision is None:
            able = decoders(ready)
            if able or not workers:
                queue.hold(record.request_id, workers, patience)
            if not able:
                life.unplaced(f"no worker is ready to decode for {request.model.name}")
            return []
        waited_s = queue.dispatch(
            record.request_id,
            decision.wait_ms,
            workers,
            patience,
            ahead=decision.ahead,
        )
        if waited_s is None:
            return []
        self._placement.book(record.placed, decision, life.token_ids)
        cause = (life.trouble if life.attempts else "", frozenset(life.avoided), len(life.history))
        placing = self._placing(record.placed, decision, waited_s, cause, everybody, apart, now)
        block_size = decision.computes.candidate.block_size
        self.decisions.placed(record.routed, placing, record.placed.hashes.get(block_size, ()), block_size)
        note = NoteChoice(decision, waited_s, life.failed, frozenset(life.avoided))
        local = decision.path is not Path.REMOTE
        return [note, *life.place(decision.decode, decision.prefill, now, local=local)]

    def _placing(
        self,
        placed: Placed,
        decision: Decision,
        waited_s: float,
        cause: tuple[str, frozenset[str], int],
        everybody: list[Card],
        apart: list[Card],
        now: float,
    ) -> Placing:
        """A decision, as it is kept for whoever asks for it later. `cause`: why the attempt before failed,
        who is avoided, how many attempts there were."""
        computes = decision.computes.candidate
        cached, holder = placed.overlap_tokens.get(computes.instance_id, 0), None
        if placed.held_tokens > cached and decision.query.handed is None:
            card = self._membership.ready_card(placed.request.model, placed.holder)
            why = PassedOver.NOT_READY
            if card is not None:
                why = self._passed_over(card, cause[1], decision, everybody, apart, now)
            holder = Holder(placed.holder, placed.held_tokens, why)
        return Placing(now, decision, waited_s, *cause, cached, holder, 0)

    def _passed_over(
        self,
        card: Card,
        avoided: Collection[str],
        decision: Decision,
        everybody: list[Card],
        apart: list[Card],
        now: float,
    ) -> PassedOver:
        """Why the instance that has most of the prompt does not compute it, although it could."""
        holder = card.instance_id
        if holder in avoided:
            return PassedOver.AVOIDED
        if self.full_until.get(holder, now) > now:
            return PassedOver.FULL
        if apart is not everybody and card not in apart:
            return PassedOver.SUSPECT
        if decision.compared(holder):
            return PassedOver.COSTLIER
        if not card.role.decodes and not any(
            it.candidate.kv_format == kv_format(card.engine) for it in decision.prefills
        ):
            never = self._settings.disagg == Disagg.NEVER
            return PassedOver.NO_PREFILL if never else PassedOver.OTHER_FORMAT
        return PassedOver.NOT_ASKED

    def _choose(
        self, record: RequestRecord, ready: list[Card], now: float
    ) -> tuple[list[Card], Decision | None]:
        """The instances among these where it may run, for all that is known of who kills engines, and the
        choice among them."""
        strikes = record.life.strikes.count
        held = record.life.waited_s(now) >= HOLD_S
        apart = self.suspects.apart(strikes, ready, held=held)
        decision = self._decide(record, apart, now)
        if not strikes and len(apart) < len(ready) and not record.fits(decision):
            return ready, self._decide(record, ready, now)  # rather beside a suspect than nowhere
        return apart, decision

    def _decide(self, record: RequestRecord, cards: list[Card], now: float) -> Decision | None:
        cards = self._not_full(cards, now)
        life = record.life
        record.placed.others_waiting = record.queue.others_waiting(record.request_id)
        return self._placement.choose(record.placed, life.token_ids, cards, life.handoff, now)

    def _not_full(self, cards: list[Card], now: float) -> list[Card]:
        if all(until <= now for until in self.full_until.values()):
            return cards
        return [card for card in cards if self.full_until.get(card.instance_id, now) <= now]

    def _rest(self, record: RequestRecord) -> list[Effect]:
        """Others may go where it must not: it waits without standing in their way."""
        record.queue.leave(record.request_id)
        record.resting = True
        return []

    def _without_its_revision(self, record: RequestRecord) -> list[Effect]:
        """It waits for workers of its revision that may return, if it has tokens already. Otherwise it had
        better be tokenized for the revision that is served."""
        life, request = record.life, record.life.request
        if not (life.output_tokens and self._membership.may_return(request.model)):
            return life.fail(ModelReplaced(request.model.name))
        return self._rest(record)

    def _work(self, record: RequestRecord) -> float:
        """What is left of it, in tokens (core/admission.py)."""
        life = record.life
        expected = self._placement.expected_output_tokens(life.request) - life.output_tokens
        return work_tokens(life.tokens, max(0.0, expected))
