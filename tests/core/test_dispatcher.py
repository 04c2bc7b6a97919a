"""What a frontend does with its requests, told as events and effects, in virtual time."""

from __future__ import annotations

import itertools
from collections import Counter
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.admission import AdmissionSettings, Refusal
from penstock.core.catalog import revision_of
from penstock.core.deadlines import Deadlines, Phase
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
    NoteChoice,
    ReleaseKv,
    SendAttempt,
    TooLong,
)
from penstock.core.lifecycle import REST_S
from penstock.core.membership import Membership
from penstock.core.placement import Placement
from penstock.core.settings import RouterSettings
from penstock.core.suspects import HOLD_S, MAX_DEATHS
from penstock.errors import ModelReplaced, Rejection, RequestRejected
from penstock.shapes import (
    Attempt,
    FinishReason,
    Load,
    ModelKey,
    Output,
    Rates,
    Registration,
    Request,
    Role,
    Sampling,
)
from tests import builders
from tests.cards import card

PROMPT = list(range(1, 41))
KV: dict[str, Any] = {"block_size": 4, "layout": "l", "transport": "tcp"}  # its format
AGGREGATED, PREFILL, DECODE = Role.AGGREGATED, Role.PREFILL, Role.DECODE
SETTINGS = RouterSettings()
ALWAYS = RouterSettings(disagg="always")
FOREVER = 1e9


class Client:
    """What the client of one request gets."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.finished: FinishReason | None = None
        self.error: RequestRejected | None = None

    @property
    def ended(self) -> bool:
        return self.finished is not None or self.error is not None


class Stage:
    """A dispatcher with the instances that it knows, and whoever carries out its effects."""

    def __init__(self, roles: dict[str, Role], settings: RouterSettings = SETTINGS) -> None:
        self.now = 100.0
        self.membership = Membership()
        self.placement = Placement(settings.policy, settings.disagg, Random(1))
        self.dispatcher = Dispatcher(settings, self.membership, self.placement, Random(1), self.now)
        self.registrations: dict[str, Registration] = {}
        self.running: dict[str, tuple[str, Attempt]] = {}  # by attempt id, with the instance
        self.held: set[str] = set()  # handoffs that prefill workers hold
        self.choices: list[NoteChoice] = []
        self.full: dict[str, str] = {}  # links that take nothing, with the error that they give
        self.ids = itertools.count()
        self.epochs = itertools.count(1)
        self.seqs = itertools.count(1)
        for instance_id, role in roles.items():
            self.up(instance_id, role)

    # --- instances ---

    def up(self, instance_id: str, role: Role = AGGREGATED, **fields: int) -> None:
        epoch = next(self.epochs)
        it = card(instance_id, role, epoch=epoch, **{"total_blocks": 1000, **KV, **fields})
        self.registrations[instance_id] = builders.registration(instance_id, epoch, role=role)
        self.membership.discovered(self.registrations)
        self.membership.up(instance_id, it)
        self.membership.loaded(instance_id)
        self.membership.elect()
        self.placement.snapshot(instance_id, [], first=True)
        self.placement.up(it, Load(total_blocks=1000))
        self.dispatcher.ready(instance_id)

    def lose(self, instance_id: str, *, died: bool = True, others: int = 0, back: bool = False) -> None:
        """An instance goes, with so many attempts of other frontends. `back`: another process takes its
        name."""
        gone = self.membership.members[instance_id].card
        assert gone is not None
        role = gone.role
        self.placement.reported(instance_id, 0, Load(running=others), self.now)
        requests = self.placement.requests(instance_id)
        self.membership.down(instance_id)
        self.membership.elect()
        self.placement.down(instance_id)
        lost = self.dispatcher.lost(
            instance_id, "killed", requests, gone.incarnation if died else None, self.now
        )
        self.running = {name: it for name, it in self.running.items() if it[0] != instance_id}
        for record, event in lost:
            self.handle(record, event)
        if back:
            self.up(instance_id, role)

    def stand_still(self, instance_id: str) -> None:
        self.membership.stuck(instance_id, "no step")
        self.membership.elect()
        for record, event in self.dispatcher.stuck(instance_id, "no step"):
            self.handle(record, event)

    # --- requests ---

    def ask(self, *, settled: bool = True, **fields: object) -> RequestRecord:
        request = Request(
            f"r{next(self.ids)}",
            ModelKey("m", self.membership.served.get("m", "v")),
            list(PROMPT),
            Sampling(max_tokens=4000),
            **fields,  # type: ignore[arg-type]
        )
        record = self.dispatcher.submit(request, Client(), self.now)
        assert not isinstance(record, Refusal)
        self.perform(record, self.dispatcher.place(record, self.now))
        return record

    def handle(self, record: RequestRecord, event: Event) -> None:
        self.perform(record, self.dispatcher.handle(record, event, self.now))

    def perform(self, record: RequestRecord, effects: list[Effect]) -> None:
        client: Client = record.client
        for effect in effects:
            match effect:
                case SendAttempt(instance_id, attempt):
                    self._send(record, instance_id, attempt)
                case CancelAttempt(_, attempt_id):
                    self.running.pop(attempt_id, None)
                case ReleaseKv(_, handoff_id):
                    self.held.discard(handoff_id)
                case NoteChoice():
                    self.choices.append(effect)
                case DeliverOutput(delta):
                    assert effect is effects[-1]
                    if record.life.phase is Phase.DONE and delta.finish_reason is None:
                        continue
                    assert not client.ended
                    client.tokens += delta.token_ids
                    client.finished = delta.finish_reason
                case FailRequest(error):
                    assert not client.ended
                    client.error = error

    def _send(self, record: RequestRecord, instance_id: str, attempt: Attempt) -> None:
        assert self.membership.members[instance_id].loaded
        if instance_id in self.full:
            self.dispatcher.refused(instance_id, self.now + 0.1)
            self.handle(record, Bounced(attempt.attempt_id, self.full[instance_id], unsent=True))
            return
        self.running[attempt.attempt_id] = instance_id, attempt
        if attempt.handoff is not None:
            self.held.discard(attempt.handoff.handoff_id)
        self.dispatcher.sent(record, instance_id, next(self.seqs), attempt, self.now)

    def say(self, record: RequestRecord, *tokens: int, end: FinishReason | None = None) -> None:
        """The instance that has a request gives these tokens."""
        attempt_id, handoff = record.life.attempt_id, None
        instance_id, attempt = self.running[attempt_id]
        if end is FinishReason.PREFILLED:
            handoff = builders.handoff(attempt_id, instance_id, num_tokens=len(attempt.token_ids), **KV)
            self.held.add(attempt_id)
        if end is not None:
            del self.running[attempt_id]
        error = "boom" if end is FinishReason.ERROR else None
        output = Output(attempt_id, list(tokens), end, handoff=handoff, error=error)
        self.perform(record, self.dispatcher.output(record, output, self.now))

    def on(self, instance_id: str) -> list[str]:
        """The requests that an instance has."""
        return [attempt.request_id for where, attempt in self.running.values() if where == instance_id]

    def fill(self, until: float = FOREVER) -> None:
        """No instance takes anything until then."""
        for instance_id in self.registrations:
            self.dispatcher.refused(instance_id, until)

    def turn(self) -> None:
        for record in self.dispatcher.turns(self.now):
            self.perform(record, self.dispatcher.place(record, self.now))

    def wait(self, seconds: float) -> None:
        """Time passes, with a tick at its end."""
        self.now += seconds
        for record in self.dispatcher.due(self.now):
            self.perform(record, self.dispatcher.tick(record, self.now))
        self.turn()

    @property
    def waiting(self) -> list[str]:
        """The requests that no instance has."""
        return [name for name, it in self.dispatcher.records.items() if it.life.phase is Phase.QUEUED]

    def check(self) -> None:
        """Hold the books against each other."""
        dispatcher = self.dispatcher
        for name, record in dispatcher.records.items():
            life = record.life
            assert life.phase is not Phase.DONE
            assert not record.client.ended
            queued = life.phase is Phase.QUEUED
            assert (record.resting + (name in record.queue) == 1) is queued
            assert bool(life.attempt_id) is not queued
            if not queued:
                assert self.running[life.attempt_id][0] == life.instance_id
            assert record.client.tokens == life.token_ids[len(PROMPT) :]
        promised = Counter(record.placed.booked_on for record in dispatcher.records.values())
        for instance_id, load in self.placement.loads.items():
            assert len(load.booked) <= promised[instance_id]
        assert sum(map(len, dispatcher.queues.values())) <= len(self.waiting)

    def check_closed(self) -> None:
        """Nothing is left of any request."""
        self.check()
        dispatcher = self.dispatcher
        assert not dispatcher.records
        assert not dispatcher.attempts
        assert not self.running
        assert not any(map(len, dispatcher.queues.values()))
        assert not any(f"r{number}" in dispatcher.suspects for number in range(next(self.ids)))


# --- placing ----------------------------------------------------------------------------------------


def test_a_new_request_is_sent_at_once_to_an_instance_with_room() -> None:
    stage = Stage({"a0": AGGREGATED})
    record = stage.ask()
    assert stage.on("a0") == ["r0"]
    (choice,) = stage.choices
    assert (choice.decision.decode, choice.waited_s, choice.failed) == ("a0", 0.0, "")
    stage.say(record, 7)
    stage.say(record, 8, end=FinishReason.STOP)
    assert record.client.tokens == [7, 8]
    stage.check_closed()


def test_a_request_waits_in_the_queue_while_all_instances_are_full() -> None:
    stage = Stage({"a0": AGGREGATED})
    stage.fill(until=stage.now + 1.0)
    stage.ask()
    stage.wait(0.9)
    assert stage.waiting == ["r0"]
    stage.wait(0.2)
    assert stage.on("a0") == ["r0"]
    assert stage.choices[0].waited_s > 0.0


def test_waiting_requests_go_by_priority_and_in_order_of_arrival() -> None:
    stage = Stage({"a0": AGGREGATED})
    stage.fill(until=stage.now + 1.0)
    for priority in (0, 1, 0, -1):
        stage.ask(priority=priority)
    stage.wait(1.1)
    assert stage.on("a0") == ["r3", "r0", "r2", "r1"]


def test_the_choices_of_a_call_go_together() -> None:
    stage = Stage({"a0": AGGREGATED})
    stage.fill(until=stage.now + 1.0)
    stage.ask()
    for _ in range(3):
        stage.ask(call_id="three", priority=-1)
    stage.wait(1.1)
    assert stage.on("a0") == ["r1", "r2", "r3", "r0"]


def test_a_request_without_any_worker_waits_until_its_queue_deadline_and_says_why() -> None:
    stage = Stage({"p0": PREFILL})
    record = stage.ask()
    stage.wait(29.0)
    assert stage.waiting == ["r0"]
    stage.wait(1.0)
    assert (record.client.error.kind, record.client.error.code) == (Rejection.UNAVAILABLE, "no_worker")
    assert "no worker is ready to decode" in str(record.client.error)
    stage.check_closed()


def test_a_queued_request_goes_to_the_worker_that_comes() -> None:
    stage = Stage({})
    stage.ask(age_s=10.0)
    stage.up("a0")
    stage.turn()
    assert stage.waiting == []


def test_deadlines_count_from_when_the_frontend_had_the_request() -> None:
    stage = Stage({})
    late = [stage.ask(age_s=age_s).client for age_s in (31.0, 1801.0)]
    stage.wait(0.1)
    kinds = [Rejection.UNAVAILABLE, Rejection.TIMED_OUT]
    assert [client.error.kind for client in late] == kinds


def test_a_request_that_would_wait_too_long_is_refused_when_it_comes() -> None:
    settings = RouterSettings(admission=AdmissionSettings(max_queued=6))
    stage = Stage({}, settings)
    stage.up("a0")
    stage.fill()
    for _ in range(3):
        stage.ask()
    model = ModelKey("m", stage.membership.served["m"])
    request = Request("r", model, PROMPT, Sampling(max_tokens=8))
    refused = stage.dispatcher.submit(request, None, stage.now)
    assert isinstance(refused, Refusal)
    assert (refused.reason, refused.limit) == ("full", "calls")
    assert "r" not in stage.dispatcher.records
    again = stage.dispatcher.refusal(model, "", 0, stage.now)
    assert isinstance(again, Refusal)


def test_a_newcomer_is_refused_when_the_workers_wait_alone_is_too_long() -> None:
    stage = Stage({"a0": AGGREGATED})
    assert stage.dispatcher.hopeless(stage.ask()) is None
    rates = Rates(step_ms=5.0, prefill_token_ms=0.05)
    load = Load(running=1, waiting=20, prefill_tokens=10_000_000, steps=50, rates=rates)
    stage.placement.reported("a0", 1, load, stage.now)
    record = stage.ask()
    refusal = stage.dispatcher.hopeless(record)
    assert refusal is not None
    assert refusal.reason == "wait"
    stage.handle(record, ClientGone())
    assert list(stage.dispatcher.records) == ["r0"]


def test_a_worker_that_bounces_is_left_alone_and_the_request_keeps_its_place_at_the_head() -> None:
    stage = Stage({"a0": AGGREGATED})
    first = stage.ask()
    stage.dispatcher.refused("a0", stage.now + 0.25)
    stage.ask()
    attempt_id = first.life.attempt_id
    del stage.running[attempt_id]
    stage.handle(first, Bounced(attempt_id, "full"))
    assert stage.waiting == ["r0", "r1"]
    stage.wait(0.2)
    assert stage.waiting == ["r0", "r1"]
    stage.wait(0.1)
    assert stage.on("a0") == ["r0", "r1"]


def test_a_full_link_is_waited_for_and_the_queue_deadline_goes_on() -> None:
    """It happens more often than an attempt may fail, or a worker refuse: nothing was lost there."""
    settings = RouterSettings(deadlines=Deadlines(max_attempts=1, max_bounces=0))
    stage = Stage({"a0": AGGREGATED}, settings)
    stage.full["a0"] = "too much waits"
    record = stage.ask()
    deadline = record.life.deadline
    for _ in range(5):
        stage.wait(0.2)
    assert record.life.attempts == 6
    assert record.life.deadline == deadline
    stage.check()
    del stage.full["a0"]
    stage.wait(0.2)
    assert stage.on("a0") == ["r0"]


def test_an_attempt_too_long_for_a_frame_ends_the_request() -> None:
    stage = Stage({"a0": AGGREGATED})
    record = stage.ask()
    stage.handle(record, TooLong(record.life.attempt_id, "20 bytes"))
    stage.running.clear()
    assert record.client.error.code == "request_too_long"
    stage.check_closed()


def test_a_freeze_of_the_frontend_is_no_measure_of_the_workers() -> None:
    stage = Stage({"a0": AGGREGATED})
    stage.fill(until=stage.now + 0.1)
    for _ in range(10):
        stage.ask()
    stage.wait(20.0)  # without a tick between
    assert stage.waiting == []
    stage.fill()
    for _ in range(10):
        stage.ask()
    (queue,) = stage.dispatcher.queues.values()
    assert queue.saturation_ms() < 1000.0


# --- disaggregation ---------------------------------------------------------------------------------


def test_a_prompt_is_handed_over_and_its_decode_worker_booked_meanwhile() -> None:
    stage = Stage({"p0": PREFILL, "d0": DECODE}, ALWAYS)
    record = stage.ask()
    assert (stage.on("p0"), record.placed.booked_on) == (["r0"], "d0")
    stage.check()
    stage.say(record, 5, end=FinishReason.PREFILLED)
    assert (stage.on("d0"), record.placed.booked_on) == (["r0"], "")
    stage.check()
    assert record.client.tokens == [5]
    stage.say(record, 6, end=FinishReason.LENGTH)
    stage.check_closed()


def test_a_decision_counts_the_others_that_wait_for_each_worker() -> None:
    stage = Stage({"p0": PREFILL, "d0": DECODE, "d1": DECODE})
    stage.fill()
    *_, last = [stage.ask() for _ in range(3)]
    stage.dispatcher.full_until.clear()
    foreseen = stage.dispatcher.foresee(last.life.request, stage.now).placings()
    stage.turn()
    decisions = [choice.decision for choice in stage.choices] + [it.decision for it in foreseen]
    waiting = [(it.query.waiting_for_prefill, it.query.waiting_for_decode) for it in decisions]
    assert waiting == [(2.0, 1.0), (1.0, 0.5), (0.0, 0.0), (3.0, 1.5)]


def test_a_request_that_waits_again_is_booked_nowhere() -> None:
    stage = Stage({"p0": PREFILL, "d0": DECODE}, ALWAYS)
    record = stage.ask()
    stage.membership.draining("d0")
    stage.membership.elect()
    stage.lose("p0", died=False)
    assert stage.waiting == ["r0"]
    assert record.placed.booked_on == ""
    stage.check()


def test_a_first_token_is_delivered_after_the_decode_worker_got_its_attempt() -> None:
    stage = Stage({"p0": PREFILL, "d0": DECODE}, ALWAYS)
    record = stage.ask()
    stage.lose("d0", died=False)
    stage.up("d1", DECODE)
    stage.say(record, 5, end=FinishReason.PREFILLED)  # `perform` asserts that it comes last
    assert stage.on("d1") == ["r0"]
    assert record.client.tokens == [5]


def test_no_output_comes_after_an_error() -> None:
    """A prefill worker gives a first token, and the attempt for the decode worker is too long."""
    stage = Stage({"p0": PREFILL, "d0": DECODE}, ALWAYS)
    record = stage.ask()
    attempt_id = record.life.attempt_id
    stage.running.clear()
    handoff = builders.handoff(attempt_id, num_tokens=len(PROMPT), **KV)
    output = Output(attempt_id, [5], FinishReason.PREFILLED, handoff=handoff)
    effects = stage.dispatcher.output(record, output, stage.now)
    stage.handle(record, TooLong(record.life.attempt_id, "20 bytes"))
    assert record.client.error.code == "request_too_long"
    stage.perform(record, effects[-1:])
    assert record.client.tokens == []


def test_a_decode_worker_that_stands_still_is_replaced_before_the_handoff_comes() -> None:
    stage = Stage({"p0": PREFILL, "d0": DECODE}, ALWAYS)
    record = stage.ask()
    stage.stand_still("d0")
    assert stage.on("p0") == ["r0"]
    stage.up("d1", DECODE)
    stage.say(record, 5, end=FinishReason.PREFILLED)
    assert stage.on("d1") == ["r0"]


def test_a_request_stays_with_the_only_decode_worker_that_stands_still_after_its_handoff() -> None:
    stage = Stage({"p0": PREFILL, "d0": DECODE}, ALWAYS)
    record = stage.ask()
    stage.say(record, 5, end=FinishReason.PREFILLED)
    stage.stand_still("d0")
    assert stage.on("d0") == ["r0"]


# --- attempts that end early ------------------------------------------------------------------------


def test_a_request_of_a_lost_worker_goes_on_elsewhere_at_once() -> None:
    stage = Stage({"a0": AGGREGATED})
    record = stage.ask()
    stage.say(record, 7, 8)
    stage.up("a1")
    stage.lose("a0", died=False)
    assert stage.on("a1") == ["r0"]
    assert stage.running[record.life.attempt_id][1].token_ids == [*PROMPT, 7, 8]
    assert stage.choices[-1].failed == "a0: killed"
    assert stage.choices[-1].avoided == {"a0"}


def test_a_request_that_comes_back_goes_before_those_that_wait() -> None:
    stage = Stage({"a0": AGGREGATED})
    stage.ask()
    stage.fill(until=stage.now + 1.0)
    stage.ask(priority=-5)
    stage.lose("a0", died=False)
    stage.up("a1")
    stage.wait(0.1)
    assert stage.on("a1") == ["r0", "r1"]


def test_a_request_rests_after_its_second_loss_and_longer_after_deaths() -> None:
    stage = Stage({f"a{number}": AGGREGATED for number in range(4)})
    record = stage.ask()
    for deaths, least_s in ((1, 0.0), (2, REST_S)):
        stage.lose(record.life.instance_id)
        assert stage.waiting == ["r0"]
        assert record.resting
        if least_s:
            stage.wait(0.99 * least_s)
            assert record.resting
            stage.wait(1.01 * least_s)  # it rests for twice as long at most
        else:
            stage.wait(0.1)
        assert stage.waiting == []
        assert record.life.strikes.deaths == deaths


def test_a_lost_worker_that_is_ready_again_is_not_avoided() -> None:
    stage = Stage({"a0": AGGREGATED, "a1": AGGREGATED})
    record = stage.ask()
    lost = record.life.instance_id
    stage.lose(lost, back=True)
    stage.dispatcher.refused("a1" if lost == "a0" else "a0", FOREVER)
    stage.wait(0.1)
    assert stage.on(lost) == ["r0"]


def test_requests_leave_a_worker_that_stands_still_if_others_can_serve_them() -> None:
    stage = Stage({"a0": AGGREGATED})
    stage.ask()
    stage.stand_still("a0")
    assert stage.on("a0") == ["r0"]
    stage.up("a1")
    stage.stand_still("a0")
    assert (stage.on("a0"), stage.on("a1")) == ([], ["r0"])


def test_a_client_that_leaves_gives_its_place_away() -> None:
    stage = Stage({"a0": AGGREGATED})
    running = stage.ask()
    stage.fill(until=stage.now + 1.0)
    waiting = stage.ask()
    for record in (running, waiting, waiting):
        stage.handle(record, ClientGone())
    stage.check_closed()


def test_only_whole_outputs_tell_how_long_outputs_are() -> None:
    stage = Stage({"a0": AGGREGATED})
    request = stage.ask().life.request
    before = stage.placement.expected_output_tokens(request)
    for complete in (False, True):
        record = stage.ask()
        stage.say(record, 7)
        stage.handle(record, ClientGone(complete))
        after = stage.placement.expected_output_tokens(request)
        assert (after != before) is complete


# --- requests that kill workers ---------------------------------------------------------------------


def kill(stage: Stage, record: RequestRecord, **how: int) -> None:
    """Wait until some worker has it, which dies then and is started again."""
    while record.life.phase is Phase.QUEUED:
        stage.wait(0.1)
    stage.lose(record.life.instance_id, back=True, **how)


@pytest.mark.parametrize(("others", "deaths"), [(0, 3), (1, MAX_DEATHS)])
def test_a_killer_is_stopped_at_its_third_worker_if_no_other_frontend_had_work_there(
    others: int, deaths: int
) -> None:
    stage = Stage({f"a{number}": AGGREGATED for number in range(4)})
    record = stage.ask()
    kill(stage, record, others=others)
    for number in range(1, deaths):
        assert not record.client.ended, number
        kill(stage, record)
    assert record.client.error.code == KILLER
    assert record.life.strikes.deaths == deaths
    stage.check_closed()


def test_the_requests_beside_a_killer_are_not_stopped_with_it() -> None:
    stage = Stage({f"a{number}": AGGREGATED for number in range(2)})
    records = [stage.ask() for _ in range(9)]
    killer = records[4]
    while not killer.client.ended:
        if killer.life.phase is Phase.QUEUED:
            for record in records:  # the others get on meanwhile
                if record is not killer and record.life.phase is not Phase.QUEUED:
                    stage.say(record, *[7] * 8)
            stage.wait(0.1)
        else:
            stage.lose(killer.life.instance_id, back=True)
    assert killer.client.error.code == KILLER
    assert killer.life.strikes.deaths == 3
    assert not any(record.client.ended for record in records if record is not killer)


def test_progress_acquits_a_request_that_met_deaths() -> None:
    stage = Stage({f"a{number}": AGGREGATED for number in range(3)})
    record = stage.ask()
    for _ in range(2 * MAX_DEATHS):
        kill(stage, record)
        while record.life.phase is Phase.QUEUED:
            stage.wait(0.1)
        stage.say(record, *[7] * 256)
    assert not record.client.ended


def test_a_worker_that_is_connected_again_has_not_died() -> None:
    stage = Stage({"a0": AGGREGATED, "a1": AGGREGATED})
    record = stage.ask()
    for _ in range(MAX_DEATHS):
        while record.life.phase is Phase.QUEUED:
            stage.wait(0.1)
        instance_id = record.life.instance_id
        same = stage.membership.members[instance_id].card
        stage.lose(instance_id)
        assert same is not None
        stage.membership.up(instance_id, same)
        stage.membership.loaded(instance_id)
        stage.membership.elect()
        stage.placement.snapshot(instance_id, [], first=True)
        stage.placement.up(same, Load())
        if record.client.ended:
            break
    assert record.client.error.code == "attempts_failed"  # 4 failures in a row, and no death but the last


def test_prime_suspects_wait_for_a_place_of_their_own_but_not_for_ever() -> None:
    stage = Stage({"a0": AGGREGATED})
    records = [stage.ask(), stage.ask()]
    for _ in range(2):
        while stage.waiting:
            stage.wait(0.1)
        stage.lose("a0", back=True)
    stage.wait(2 * REST_S + 0.1)
    assert [record.resting for record in records].count(True) == 1
    stage.wait(HOLD_S)
    assert len(stage.on("a0")) == 2


def test_other_requests_are_placed_beside_a_suspect_rather_than_nowhere() -> None:
    stage = Stage({"a0": AGGREGATED, "a1": AGGREGATED})
    suspect = stage.ask()
    for _ in range(2):
        kill(stage, suspect)
    while suspect.life.phase is Phase.QUEUED:
        stage.wait(0.1)
    beside, free = suspect.life.instance_id, "a1" if suspect.life.instance_id == "a0" else "a0"
    assert stage.ask().life.instance_id == free
    stage.dispatcher.refused(free, FOREVER)
    assert stage.ask().life.instance_id == beside


# --- revisions --------------------------------------------------------------------------------------


def replaced(stage: Stage) -> None:
    """The model is served in another revision from now on."""
    stage.up("b0", vocab_size=600)
    stage.wait(0.1)


def test_requests_without_tokens_are_given_back_when_their_revision_is_gone() -> None:
    """All of them with the next tick."""
    stage = Stage({"a0": AGGREGATED})
    running = stage.ask()
    stage.fill()
    waiting = [stage.ask() for _ in range(4)]
    stage.lose("a0")
    replaced(stage)
    assert all(isinstance(record.client.error, ModelReplaced) for record in waiting)
    assert isinstance(running.client.error, ModelReplaced)
    stage.check_closed()


def test_a_request_with_tokens_waits_for_a_worker_of_its_revision_that_may_return() -> None:
    stage = Stage({"a0": AGGREGATED})
    record = stage.ask()
    stage.say(record, 7)
    stage.lose("a0")
    replaced(stage)
    stage.wait(1.0)
    assert record.resting
    stage.up("a0")
    stage.wait(0.1)
    assert stage.on("a0") == ["r0"]


def test_a_request_with_tokens_ends_when_no_worker_of_its_revision_can_return() -> None:
    stage = Stage({"a0": AGGREGATED})
    record = stage.ask()
    stage.say(record, 7)
    stage.lose("a0")
    del stage.registrations["a0"]
    replaced(stage)
    stage.wait(0.1)
    assert isinstance(record.client.error, ModelReplaced)


def test_a_running_request_stays_with_a_worker_of_its_revision_on_standby() -> None:
    stage = Stage({"a0": AGGREGATED, "a1": AGGREGATED})
    record = stage.ask()
    for name in ("b0", "b1", "b2"):
        stage.up(name, vocab_size=600)
    lost = record.life.instance_id
    stage.lose(lost, died=False)
    assert record.life.instance_id == {"a0": "a1", "a1": "a0"}[lost]


def test_queues_that_no_request_needs_are_named() -> None:
    stage = Stage({"a0": AGGREGATED})
    record = stage.ask()
    key = "m", revision_of(stage.membership.members["a0"].card)  # type: ignore[arg-type]
    assert stage.dispatcher.unused_queues() == []
    stage.say(record, 7, end=FinishReason.STOP)
    assert stage.dispatcher.unused_queues() == [key]


# --- whatever happens -------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["queued", "prefill", "decode", "resting"])
def test_a_dropped_request_leaves_nothing_in_the_books(state: str) -> None:
    stage = Stage({"p0": PREFILL, "d0": DECODE}, ALWAYS)
    if state == "queued":
        stage.fill()
    record = stage.ask()
    if state == "decode":
        stage.say(record, 5, end=FinishReason.PREFILLED)
    if state == "resting":
        stage.lose("p0")
        assert record.resting
    stage.running.clear()
    stage.dispatcher.drop(record)
    stage.dispatcher.drop(record)
    stage.check_closed()


ACTIONS = [
    "ask",
    "ask",
    "token",
    "token",
    "token",
    "end",
    "fail",
    "hand_back",
    "bounce",
    "full",
    "wait",
    "rest",
    "lose",
    "reset",
    "stand_still",
    "advance",
    "hang_up",
]


def act(stage: Stage, action: str, pick: Random) -> None:
    records = [it for it in stage.dispatcher.records.values() if it.life.phase is not Phase.QUEUED]
    record = pick.choice(records) if records else None
    instance_id = pick.choice(["p0", "p1", "d0", "d1", "d2"])
    up = stage.membership.members[instance_id].up
    if action == "ask" and len(stage.dispatcher.records) < 12:
        stage.ask(priority=pick.randint(-1, 1), tenant=pick.choice("ab"))
    elif action in ("token", "end", "fail", "hand_back") and record is not None:
        end = {"end": FinishReason.STOP, "fail": FinishReason.ERROR, "hand_back": FinishReason.CANCELLED}
        reason, tokens = end.get(action), [] if action in ("fail", "hand_back") else [pick.randint(1, 99)]
        if action == "token" and stage.running[record.life.attempt_id][1].prefill_only:
            reason = FinishReason.PREFILLED
        stage.say(record, *tokens, end=reason)
    elif action == "bounce" and record is not None:
        attempt_id, where = record.life.attempt_id, record.life.instance_id
        del stage.running[attempt_id]
        stage.dispatcher.refused(where, stage.now + 0.25)
        stage.handle(record, Bounced(attempt_id, "full"))
    elif action == "full":
        stage.full = {} if stage.full else {instance_id: "too much waits"}
    elif action in ("wait", "rest"):
        stage.wait(0.1 if action == "wait" else 3.0)
    elif action in ("lose", "reset") and up:
        stage.lose(instance_id, died=action == "lose", others=pick.randint(0, 1), back=True)
    elif action == "stand_still" and up:
        stage.stand_still(instance_id)
    elif action == "advance":
        stage.membership.advancing(instance_id)
        stage.membership.elect()
        stage.dispatcher.ready(instance_id)
        stage.turn()
    elif action == "hang_up" and stage.dispatcher.records:
        stage.handle(pick.choice(list(stage.dispatcher.records.values())), ClientGone())


@given(
    st.lists(st.sampled_from(ACTIONS), max_size=60),
    st.randoms(use_true_random=False),
    st.sampled_from(["auto", "always"]),
)
def test_any_history_keeps_the_books_and_leaves_nothing(
    history: list[str], pick: Random, disagg: str
) -> None:
    roles = {"p0": PREFILL, "p1": PREFILL, "d0": DECODE, "d1": DECODE, "d2": DECODE}
    stage = Stage(roles, RouterSettings(disagg=disagg))
    for action in history:
        act(stage, action, pick)
        stage.check()
    for record in list(stage.dispatcher.records.values()):
        stage.handle(record, ClientGone())
    stage.check_closed()
