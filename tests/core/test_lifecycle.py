"""One request's life, told as events and effects, without a clock or a socket."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.attempt_times import AttemptTimes
from penstock.core.deadlines import Deadlines, Phase
from penstock.core.events import (
    KILLER,
    Bounced,
    CancelAttempt,
    ClientGone,
    DeliverOutput,
    Effect,
    FailRequest,
    InstanceLost,
    InstanceStuck,
    ReleaseKv,
    SendAttempt,
    TooLong,
)
from penstock.core.lifecycle import REST_S, Lifecycle
from penstock.errors import Rejection, RequestRejected
from penstock.shapes import FinishReason, Handoff, Incarnation, ModelKey, Output, Request, Sampling
from tests import builders

LIMITS = Deadlines(
    queue_s=30,
    prefill_s=90,
    transfer_s=45,
    first_token_s=120,
    stall_s=60,
    request_s=1000,
    max_attempts=3,
    max_bounces=5,
)
PROMPT = [1, 2, 3, 4, 5]


def lifecycle() -> Lifecycle:
    return Lifecycle(
        Request("r", ModelKey("m", "v"), list(PROMPT), Sampling(max_tokens=8, seed=7)), LIMITS, now=0.0
    )


def handoff(attempt_id: str, instance_id: str = "p0", ttl_s: float = 30.0) -> Handoff:
    return builders.handoff(attempt_id, instance_id, num_tokens=len(PROMPT), block_size=4, ttl_s=ttl_s)


def sent(effects: list[Effect]) -> SendAttempt:
    (send,) = (effect for effect in effects if isinstance(effect, SendAttempt))
    return send


def waits(life: Lifecycle, *avoided: str, failed: str = "") -> bool:
    """Whether the next attempt may be placed now, elsewhere than on these, after this failure."""
    assert life.avoided == {*avoided}
    assert life.failed == failed
    return life.phase is Phase.QUEUED


def emitted(effects: list[Effect]) -> list[int]:
    return [
        token for effect in effects if isinstance(effect, DeliverOutput) for token in effect.delta.token_ids
    ]


def prefilled(life: Lifecycle, token: int = 10, ttl_s: float = 30.0, now: float = 1.0) -> list[Effect]:
    """Place on p0 with d0 to decode, and let the prefill worker answer."""
    attempt = sent(life.place("d0", "p0", 0.0)).attempt
    output = Output(
        attempt.attempt_id,
        [token],
        FinishReason.PREFILLED,
        cached_tokens=0,
        handoff=handoff(attempt.attempt_id, ttl_s=ttl_s),
    )
    return life.handle(output, now)


def test_an_attempt_too_long_to_be_sent_is_the_requests_own_fault() -> None:
    life = lifecycle()
    attempt_id = sent(life.place("d0", None, 0.0)).attempt.attempt_id
    assert life.handle(TooLong("r.0", "of another attempt"), 0.0) == []
    (fail,) = life.handle(TooLong(attempt_id, "20 bytes"), 0.0)
    assert (fail.error.kind, fail.error.code) == (Rejection.INVALID, "request_too_long")
    assert "20 bytes" in str(fail.error)
    assert life.phase is Phase.DONE
    assert not life.strikes.count


def test_a_continuation_too_long_to_be_sent_lets_go_of_its_handoff() -> None:
    life = lifecycle()
    attempt_id = sent(prefilled(life)).attempt.attempt_id
    release, fail = life.handle(TooLong(attempt_id, "20 bytes"), 1.0)
    assert release == ReleaseKv("p0", "r.1", sent=True)
    assert fail.error.kind is Rejection.INVALID


def test_a_new_request_waits_for_a_place_until_its_queue_deadline() -> None:
    life = lifecycle()
    assert waits(life)
    assert life.rests_until < 0.0
    assert life.deadline == 30.0


def test_history_tells_when_each_attempt_was_sent_and_answered_and_why_there_was_another() -> None:
    life = lifecycle()
    second = sent(prefilled(life, now=1.5)).attempt  # sent to p0 at 0.0
    life.handle(InstanceLost("d0", "gone"), 2.0)
    third = sent(life.place("d1", None, 2.5)).attempt
    life.handle(Output(third.attempt_id, [11]), 3.0)
    life.handle(Output(third.attempt_id, [12], FinishReason.STOP), 4.0)
    assert life.history == [
        AttemptTimes("r.1", "p0", True, 0.0, 0.0, first_output_s=1.5, cached_tokens=0),
        AttemptTimes(second.attempt_id, "d0", False, 1.5, None),
        AttemptTimes(third.attempt_id, "d1", False, 2.5, 2.0, "d0: gone", first_output_s=3.0),
    ]


def test_history_leaves_out_an_attempt_that_a_full_link_did_not_take() -> None:
    life = lifecycle()
    attempt_id = sent(life.place("d0", None, 1.0)).attempt.attempt_id
    life.handle(Bounced(attempt_id, "the link is full", unsent=True), 1.0)
    assert life.history == []


def test_local_request_runs_to_its_end() -> None:
    life = lifecycle()
    send = sent(life.place("d0", None, 0.0))
    assert send.instance_id == "d0"
    assert not send.attempt.prefill_only
    assert send.attempt.token_ids == PROMPT
    assert emitted(life.handle(Output(send.attempt.attempt_id, [10], cached_tokens=4), 1.0)) == [10]
    assert life.deadline == 61.0
    last = life.handle(Output(send.attempt.attempt_id, [11], FinishReason.STOP), 2.0)
    assert last == [
        DeliverOutput(msgspec.convert({"token_ids": [11], "finish_reason": "stop"}, type(last[0].delta)))
    ]
    assert life.phase is Phase.DONE


def test_prefill_token_is_emitted_and_decode_continues_with_the_handoff() -> None:
    life = lifecycle()
    effects = prefilled(life, token=10)
    assert emitted(effects) == [10]
    assert isinstance(effects[-1], DeliverOutput)
    send = sent(effects)
    assert send.instance_id == "d0"
    assert send.attempt.token_ids == [*PROMPT, 10]
    assert send.attempt.prompt_len == len(PROMPT)
    assert send.attempt.handoff is not None
    assert send.attempt.handoff.num_tokens == len(PROMPT)
    assert life.phase is Phase.TRANSFER


def test_first_token_that_ends_the_request_needs_no_decode_worker() -> None:
    life = lifecycle()
    attempt = sent(life.place("d0", "p0", 0.0)).attempt
    effects = life.handle(Output(attempt.attempt_id, [10], FinishReason.LENGTH), 1.0)
    assert emitted(effects) == [10]
    assert life.phase is Phase.DONE


def test_lost_decode_worker_continues_from_the_tokens_so_far() -> None:
    life = lifecycle()
    first = sent(prefilled(life, token=10)).attempt
    life.handle(Output(first.attempt_id, [11, 12]), 2.0)
    assert life.handle(InstanceLost("d0", "link down"), 3.0) == []
    assert waits(life, "d0", failed="d0: link down")
    again = sent(life.place("d1", None, 3.0)).attempt
    assert again.token_ids == [*PROMPT, 10, 11, 12]
    assert again.prompt_len == len(PROMPT)
    assert again.handoff is None
    assert again.sampling == first.sampling
    assert again.attempt_id != first.attempt_id


def test_output_of_a_forgotten_attempt_is_dropped_and_its_kv_released() -> None:
    life = lifecycle()
    attempt = sent(life.place("d0", "p0", 0.0)).attempt
    life.handle(InstanceLost("p0", "silent"), 1.0)
    late = Output(attempt.attempt_id, [9], FinishReason.PREFILLED, handoff=handoff(attempt.attempt_id))
    assert life.handle(late, 2.0) == [ReleaseKv("p0", attempt.attempt_id)]
    assert life.token_ids == PROMPT


def test_lost_decode_worker_during_prefill_is_replaced_when_the_handoff_comes() -> None:
    life = lifecycle()
    attempt = sent(life.place("d0", "p0", 0.0)).attempt
    assert life.handle(InstanceLost("d0", "gone"), 0.5) == []
    output = Output(attempt.attempt_id, [10], FinishReason.PREFILLED, handoff=handoff(attempt.attempt_id))
    assert emitted(life.handle(output, 1.0)) == [10]
    assert waits(life)
    assert life.handoff == output.handoff
    send = sent(life.place("d1", None, 1.0))
    assert send.instance_id == "d1"
    assert send.attempt.handoff is not None


def test_handoff_loses_life_while_it_waits_here() -> None:
    life = lifecycle()
    attempt = sent(life.place("d0", "p0", 0.0)).attempt
    life.handle(InstanceLost("d0", "gone"), 0.5)
    offered = handoff(attempt.attempt_id, ttl_s=10.0)
    life.handle(Output(attempt.attempt_id, [10], FinishReason.PREFILLED, handoff=offered), 1.0)
    send = sent(life.place("d1", None, 5.0))
    assert send.attempt.handoff is not None
    assert send.attempt.handoff.ttl_s == pytest.approx(6.0)


def test_handoff_too_old_is_released_not_used() -> None:
    life = lifecycle()
    attempt = sent(life.place("d0", "p0", 0.0)).attempt
    life.handle(InstanceLost("d0", "gone"), 0.5)
    offered = handoff(attempt.attempt_id, ttl_s=10.0)
    life.handle(Output(attempt.attempt_id, [10], FinishReason.PREFILLED, handoff=offered), 1.0)
    effects = life.place("d1", None, 10.5)
    assert effects[0] == ReleaseKv("p0", attempt.attempt_id)
    assert sent(effects).attempt.handoff is None


@pytest.mark.parametrize("prefill", [None, "p1"])
def test_a_handoff_that_nobody_can_use_is_released_when_another_worker_computes_the_prompt(
    prefill: str | None,
) -> None:
    life = lifecycle()
    attempt = sent(life.place("d0", "p0", 0.0)).attempt
    life.handle(InstanceLost("d0", "gone"), 0.5)
    offered = handoff(attempt.attempt_id)
    life.handle(Output(attempt.attempt_id, [10], FinishReason.PREFILLED, handoff=offered), 1.0)
    effects = life.place("d1", prefill, 2.0, local=prefill is None)
    assert effects[0] == ReleaseKv("p0", attempt.attempt_id)
    assert sent(effects).attempt.handoff is None
    assert sent(effects).attempt.token_ids == [*PROMPT, 10]


def test_bounced_decode_keeps_the_handoff_for_the_next_one() -> None:
    life = lifecycle()
    send = sent(prefilled(life))
    assert life.handle(Bounced(send.attempt.attempt_id, "full"), 2.0) == []
    assert waits(life)  # a full worker is full for all requests, which is no concern of this one
    assert life.handoff is not None
    again = sent(life.place("d1", None, 2.0)).attempt
    assert again.handoff is not None
    assert again.handoff.ttl_s == pytest.approx(29.0)


def test_lost_decode_attempt_releases_the_handoff_it_may_not_have_pulled() -> None:
    life = lifecycle()
    prefilled(life)
    effects = life.handle(InstanceLost("d0", "killed"), 2.0)
    assert effects == [ReleaseKv("p0", "r.1", sent=True)]
    assert waits(life, "d0", failed="d0: killed")


def test_failing_everywhere_ends_with_the_last_reason() -> None:
    life = lifecycle()
    for number, instance in enumerate(("d0", "d1", "d2"), start=1):
        attempt = sent(life.place(instance, None, 0.0)).attempt
        effects = life.handle(
            Output(attempt.attempt_id, [], FinishReason.ERROR, error=f"boom {number}"), 1.0
        )
    (fail,) = effects
    assert isinstance(fail, FailRequest)
    assert "boom 3" in str(fail.error)
    assert "d2" in str(fail.error)
    assert life.phase is Phase.DONE


def test_workers_that_die_together_do_not_use_up_the_attempts() -> None:
    life = lifecycle()
    life.place("d0", None, 0.0)
    assert life.handle(InstanceLost("d0", "reset"), 1.0) == []
    assert waits(life, "d0", failed="d0: reset")
    assert life.rests_until < 1.0  # the next attempt follows at once
    life.place("d1", None, 1.0)
    assert life.handle(InstanceLost("d1", "reset"), 1.0) == []
    assert waits(life, "d0", "d1", failed="d1: reset")
    assert life.rests_until == 1.0  # the next attempt follows later than that


def test_a_request_rests_after_a_death_and_longer_after_more() -> None:
    life = lifecycle()
    now = 0.0
    for deaths, rest_s in ((1, 0.0), (2, REST_S)):
        life.place(f"d{deaths}", None, now)
        assert (
            life.handle(InstanceLost(f"d{deaths}", "reset", died=Incarnation(f"d{deaths}", 1)), now) == []
        )
        assert life.rests_until == now + rest_s
        assert life.failed == f"d{deaths}: reset"
        now += rest_s


def test_leaving_workers_may_hand_a_request_back_more_often_than_it_may_fail() -> None:
    life = lifecycle()
    assert LIMITS.max_bounces > LIMITS.max_attempts
    for number in range(LIMITS.max_bounces):
        attempt = sent(life.place(f"d{number}", None, 0.0)).attempt
        life.handle(Output(attempt.attempt_id, [number]), 1.0)
        assert life.handle(Output(attempt.attempt_id, [], FinishReason.CANCELLED), 1.0) == []
        assert waits(life, f"d{number}", failed=f"d{number}: handed back by a leaving worker")
    assert life.token_ids == [*PROMPT, *range(LIMITS.max_bounces)]


def test_bounces_without_end_are_an_overload() -> None:
    life = lifecycle()
    for _ in range(LIMITS.max_bounces + 1):
        attempt = sent(life.place("d0", None, 0.0)).attempt
        effects = life.handle(Bounced(attempt.attempt_id, "full"), 0.0)
    (fail,) = effects
    assert isinstance(fail.error, RequestRejected)
    assert fail.error.kind is Rejection.OVERLOADED
    assert fail.error.retry_after_s


def test_a_bounce_of_long_ago_is_forgotten_once_it_gets_on() -> None:
    life = lifecycle()
    for number in range(3 * LIMITS.max_bounces):
        attempt = sent(life.place("d0", None, 0.0)).attempt
        life.handle(Bounced(attempt.attempt_id, "full"), 0.0)
        attempt = sent(life.place("d1", None, 0.0)).attempt
        assert emitted(life.handle(Output(attempt.attempt_id, [number]), 1.0)) == [number]
        life.handle(Output(attempt.attempt_id, [], FinishReason.CANCELLED), 1.0)  # d1 leaves
    assert life.phase is Phase.QUEUED


def test_a_prefill_alone_does_not_end_a_row_of_bounces() -> None:
    """Else a request could go round for ever, a token at a time."""
    life = lifecycle()
    effects: list[Effect] = []
    for now in range(LIMITS.max_bounces + 1):
        effects = prefilled(life, now=float(now), ttl_s=0.0)
        effects = life.handle(Bounced(sent(effects).attempt.attempt_id, "full"), float(now))
    assert isinstance(effects[-1], FailRequest)


def test_who_gets_on_avoids_nobody_any_more() -> None:
    """Workers that it left are restarted under their names; else all would gather on the last ones."""
    life = lifecycle()
    for number in range(3):
        attempt = sent(life.place(f"d{number}", None, 0.0)).attempt
        life.handle(Output(attempt.attempt_id, [number]), 1.0)
        life.handle(Output(attempt.attempt_id, [], FinishReason.CANCELLED), 1.0)
        assert life.avoided == {f"d{number}"}


def test_a_suspect_goes_on_avoiding_until_it_is_acquitted() -> None:
    life = lifecycle()
    for number in range(2):
        attempt = sent(life.place(f"d{number}", None, 0.0)).attempt
        life.handle(Output(attempt.attempt_id, [number]), 1.0)
        life.handle(Output(attempt.attempt_id, [], FinishReason.ERROR, error="boom"), 1.0)
    assert life.avoided == {"d0", "d1"}
    attempt = sent(life.place("d2", None, 2.0)).attempt
    life.handle(Output(attempt.attempt_id, list(range(16))), 3.0)
    life.handle(Output(attempt.attempt_id, [], FinishReason.ERROR, error="boom"), 3.0)
    assert life.avoided == {"d2"}


def test_queue_deadline_names_the_trouble() -> None:
    life = lifecycle()
    life.unplaced("no decode worker is ready")
    assert life.tick(29.9) == []
    (fail,) = life.tick(30.0)
    assert fail.error.kind is Rejection.UNAVAILABLE
    assert "no decode worker is ready" in fail.error.message


def test_avoided_instances_are_forgiven_when_nobody_else_is_there() -> None:
    life = lifecycle()
    sent(life.place("d0", None, 0.0))
    life.handle(InstanceLost("d0", "killed"), 0.0)
    assert life.avoided == {"d0"}
    life.unplaced("all avoided")
    assert waits(life, failed="d0: killed")


def test_a_queued_request_that_fails_releases_the_kv_that_is_held_for_it() -> None:
    life = lifecycle()
    attempt = sent(life.place("d0", "p0", 0.0)).attempt
    life.handle(InstanceLost("d0", "gone"), 0.5)
    offered = handoff(attempt.attempt_id)
    life.handle(Output(attempt.attempt_id, [10], FinishReason.PREFILLED, handoff=offered), 1.0)
    error = RequestRejected("replaced", kind=Rejection.UNAVAILABLE)
    assert life.fail(error) == [ReleaseKv("p0", attempt.attempt_id), FailRequest(error)]
    assert life.phase is Phase.DONE


def test_stalled_attempt_is_cancelled_and_tried_elsewhere() -> None:
    life = lifecycle()
    attempt = sent(life.place("d0", None, 0.0)).attempt
    life.handle(Output(attempt.attempt_id, [10]), 1.0)
    effects = life.tick(61.0)
    late = "d0: no next token within 60 s"
    assert effects == [CancelAttempt("d0", attempt.attempt_id)]
    assert waits(life, "d0", failed=late)


@pytest.mark.parametrize(
    ("remote", "tokens", "late"),
    [
        (True, 0, "p0: no prefill within 90 s"),
        (True, 1, "d0: no token after the KV transfer within 45 s"),
        (False, 0, "d0: no first token within 120 s"),
        (False, 1, "d0: no next token within 60 s"),
    ],
)
def test_every_phase_has_its_own_deadline_and_says_so(remote: bool, tokens: int, late: str) -> None:
    life = lifecycle()
    if remote and tokens:
        prefilled(life, now=0.0)
    else:
        attempt = sent(life.place("d0", "p0" if remote else None, 0.0)).attempt
        if tokens:
            life.handle(Output(attempt.attempt_id, [10]), 0.0)
    seconds = float(late.split()[-2])
    assert life.deadline == seconds
    assert life.tick(seconds - 0.1) == []
    effects = life.tick(seconds)
    assert isinstance(effects[0], CancelAttempt)
    assert life.trouble == late
    assert waits(life, late[:2], failed=late)


def test_late_attempts_end_in_an_error_that_names_each() -> None:
    life = lifecycle()
    now = 0.0
    for instance in ("d0", "d1", "d2"):
        life.place(instance, None, now)
        now = life.deadline
        effects = life.tick(now)
    error = effects[-1].error
    assert (error.kind, error.code) == (Rejection.TIMED_OUT, "first_token_timeout")
    assert str(error) == "3 attempts failed: " + "; ".join(
        f"{instance}: no first token within 120 s" for instance in ("d0", "d1", "d2")
    )


def test_standing_still_moves_a_request_so_often_and_never_fails_it() -> None:
    life = lifecycle()
    for number in range(LIMITS.max_moves):
        attempt = sent(life.place(f"d{number}", None, 0.0)).attempt
        effects = life.handle(InstanceStuck(f"d{number}", "no step for 3 s"), 3.0)
        assert effects[0] == CancelAttempt(f"d{number}", attempt.attempt_id)
        assert life.phase is Phase.QUEUED
    life.place("d9", None, 4.0)
    assert life.handle(InstanceStuck("d9", "no step for 3 s"), 7.0) == []
    assert life.phase is Phase.FIRST_TOKEN
    assert life.strikes.failures == 0


def test_standing_still_elsewhere_only_changes_who_decodes() -> None:
    life = lifecycle()
    attempt = sent(life.place("d0", "p0", 0.0)).attempt
    assert life.handle(InstanceStuck("d0", "no step"), 1.0) == []
    output = Output(attempt.attempt_id, [10], FinishReason.PREFILLED, handoff=handoff(attempt.attempt_id))
    assert emitted(life.handle(output, 2.0)) == [10]
    assert waits(life)


def test_deaths_stop_a_request_that_alone_can_be_their_cause() -> None:
    life = lifecycle()
    for number in range(3):
        life.place(f"d{number}", None, 0.0)
        effects = life.handle(
            InstanceLost(f"d{number}", "killed", died=Incarnation(f"d{number}", 1), alone=number == 2), 1.0
        )
    assert (effects[-1].error.kind, effects[-1].error.code) == (Rejection.WORKERS_FAILED, KILLER)
    assert "3 workers died computing it (d0@1, d1@1, d2@1)" in str(effects[-1].error)


def test_deaths_with_others_around_do_not() -> None:
    life = lifecycle()
    for number in range(4):
        life.place(f"d{number}", None, 0.0)
        life.handle(InstanceLost(f"d{number}", "killed", died=Incarnation(f"d{number}", 1)), 1.0)
    assert life.phase is Phase.QUEUED


def test_progress_between_them_forgives_failures() -> None:
    life = lifecycle()
    for number in range(3 * LIMITS.max_attempts):
        attempt = sent(life.place(f"d{number % 3}", None, 0.0)).attempt
        life.handle(Output(attempt.attempt_id, list(range(16))), 1.0)
        life.handle(Output(attempt.attempt_id, [], FinishReason.ERROR, error="boom"), 2.0)
        assert life.phase is Phase.QUEUED


def test_request_deadline_bounds_everything() -> None:
    life = lifecycle()
    attempt = sent(life.place("d0", None, 0.0)).attempt
    for second in range(0, 1000, 50):
        life.handle(Output(attempt.attempt_id, [second]), float(second))
    cancel, fail = life.tick(1000.0)
    assert cancel == CancelAttempt("d0", attempt.attempt_id)
    assert fail.error.kind is Rejection.TIMED_OUT
    assert str(fail.error) == "request took longer than 1000 s: no next token from d0 for 50 s"


def test_client_gone_cancels_and_releases() -> None:
    life = lifecycle()
    send = sent(prefilled(life))
    assert life.handle(ClientGone(), 2.0) == [
        CancelAttempt("d0", send.attempt.attempt_id),
        ReleaseKv("p0", "r.1", sent=True),
    ]
    assert life.handle(ClientGone(), 3.0) == []
    assert life.tick(1e6) == []


def test_an_output_is_complete_unless_something_cut_it_short() -> None:
    for end, complete in (
        (FinishReason.STOP, True),
        (FinishReason.LENGTH, True),
        (FinishReason.REJECTED, False),
        (ClientGone(), False),
        (ClientGone(complete=True), True),
    ):
        life = lifecycle()
        attempt = sent(life.place("d0", None, 0.0)).attempt
        life.handle(Output(attempt.attempt_id, [10]), 1.0)
        assert not life.complete
        life.handle(end if isinstance(end, ClientGone) else Output(attempt.attempt_id, [], end), 2.0)
        assert life.phase is Phase.DONE
        assert life.complete is complete


def test_cached_tokens_are_those_of_the_first_attempt() -> None:
    life = lifecycle()
    first = sent(life.place("d0", None, 0.0)).attempt
    effects = life.handle(Output(first.attempt_id, [10], cached_tokens=4), 1.0)
    assert effects[0].delta.cached_tokens == 4
    life.handle(InstanceLost("d0", "gone"), 2.0)
    second = sent(life.place("d1", None, 2.0)).attempt
    effects = life.handle(Output(second.attempt_id, [11], cached_tokens=0), 3.0)
    assert effects[0].delta.cached_tokens is None


# --- whatever happens -----------------------------------------------------------------------------


class Story:
    """Plays a random history as the router would, and holds the invariants at every event."""

    def __init__(self) -> None:
        self.life = lifecycle()
        self.now = 0.0
        self.next_token = 100
        self.running: dict[str, SendAttempt] = {}  # what workers believe they run
        self.held: set[str] = set()  # handoffs that prefill workers hold
        self.used: set[str] = set()
        self.emitted: list[int] = []
        self.ended = 0
        self.gone = False

    def perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case SendAttempt(_, attempt):
                    assert self.life.phase in (Phase.PREFILL, Phase.TRANSFER, Phase.FIRST_TOKEN)
                    assert attempt.token_ids == [*PROMPT, *self.emitted] or self.emission_follows(attempt)
                    self.running[attempt.attempt_id] = effect
                    if attempt.handoff is not None:
                        assert attempt.handoff.ttl_s >= LIMITS.handoff_margin_s
                case CancelAttempt(_, attempt_id):
                    self.running.pop(attempt_id, None)
                case ReleaseKv(_, handoff_id):
                    self.held.discard(handoff_id)
                case DeliverOutput(delta):
                    self.emitted += delta.token_ids
                    self.ended += delta.finish_reason is not None
                case FailRequest():
                    self.ended += 1
        assert self.life.token_ids == [*PROMPT, *self.emitted]
        assert self.ended == (self.life.phase is Phase.DONE and not self.gone)

    def emission_follows(self, attempt: object) -> bool:
        return attempt.token_ids[:-1] == [*PROMPT, *self.emitted]

    def step(self, action: str, pick: int) -> None:
        self.now += 0.5
        sends = list(self.running.values())
        send = sends[pick % len(sends)] if sends else None
        if action == "place" and self.life.phase is Phase.QUEUED:
            prefill = f"p{pick % 3}" if pick % 2 else None
            local = prefill is None and (pick % 5 == 0 or not self.handed())
            self.perform(self.life.place(f"d{pick % 3}", prefill, self.now, local=local))
        elif action == "lose":
            instance = f"{'pd'[pick % 2]}{pick % 3}"
            gone = [key for key, value in self.running.items() if value.instance_id == instance]
            for key in gone:
                del self.running[key]
            self.perform(self.life.handle(InstanceLost(instance, "lost"), self.now))
        elif action == "bounce" and send is not None:
            del self.running[send.attempt.attempt_id]
            self.perform(self.life.handle(Bounced(send.attempt.attempt_id, "full"), self.now))
        elif action in ("token", "finish", "error", "cancelled") and send is not None:
            self.answer(action, send)
        elif action == "tick":
            self.now += 50.0
            self.perform(self.life.tick(self.now))

    def handed(self) -> bool:
        return self.life.handoff is not None

    def answer(self, action: str, send: SendAttempt) -> None:
        attempt = send.attempt
        self.next_token += 1
        output = Output(attempt.attempt_id, [self.next_token])
        if attempt.handoff is not None and attempt.handoff.handoff_id not in self.used:
            self.used.add(attempt.handoff.handoff_id)
            self.held.discard(attempt.handoff.handoff_id)
        if action == "error":
            output = Output(attempt.attempt_id, [], FinishReason.ERROR, error="boom")
        elif action == "cancelled":
            output = Output(attempt.attempt_id, [], FinishReason.CANCELLED)
        elif attempt.prefill_only and action == "token":
            output.finish_reason = FinishReason.PREFILLED
            output.handoff = handoff(attempt.attempt_id, send.instance_id)
            self.held.add(attempt.attempt_id)
        elif action == "finish":
            output.finish_reason = FinishReason.STOP
        if output.finish_reason is not None:
            del self.running[attempt.attempt_id]
        self.perform(self.life.handle(output, self.now))


ACTIONS = st.sampled_from(
    [
        "place",
        "place",
        "token",
        "token",
        "finish",
        "error",
        "cancelled",
        "lose",
        "bounce",
        "tick",
    ]
)


@given(st.lists(st.tuples(ACTIONS, st.integers(0, 11)), max_size=60))
def test_any_history_ends_once_and_leaks_nothing(history: list[tuple[str, int]]) -> None:
    story = Story()
    for action, pick in history:
        story.step(action, pick)
    story.gone = story.ended == 0
    story.perform(story.life.handle(ClientGone(), story.now))
    assert story.life.phase is Phase.DONE
    current = {send.attempt.attempt_id for send in story.running.values()}
    # Whatever workers still believe to run was lost to us by a deadline or an instance's death, and
    # whatever they still hold is held for one of those: late outputs release it.
    for attempt_id in current:
        late = Output(attempt_id, [1], FinishReason.PREFILLED, handoff=handoff(attempt_id))
        assert story.life.handle(late, story.now) == [ReleaseKv("p0", attempt_id)]
