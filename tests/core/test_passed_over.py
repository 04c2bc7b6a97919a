"""Why the worker that has most of a prompt cached does not compute it, in each case that there is."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from penstock.core.catalog import revision_of
from penstock.core.decision_record import Holder, PassedOver
from penstock.core.dispatcher import Dispatcher, RequestRecord
from penstock.core.events import Effect, SendAttempt
from penstock.core.hashing import root_hash, sequence_hashes
from penstock.core.membership import Membership
from penstock.core.overlap_check import MIN_OBSERVATIONS
from penstock.core.placement import Placement
from penstock.core.settings import RouterSettings
from penstock.errors import ProtocolError
from penstock.shapes import (
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

BLOCK_SIZE = 16
PROMPT = list(range(640))
HASHES = sequence_hashes(PROMPT, BLOCK_SIZE, root_hash("m"))
RATES = Rates(prefill_token_ms=0.1)
REQUEST = Request("r-0", ModelKey("m", revision_of(card())), PROMPT, Sampling(max_tokens=4))


class Graph:
    """Workers w0, w1 and so on, of which w0 has the prompt cached; and a prefill worker p0, if wanted."""

    def __init__(self, policy: str = "kv", disagg: str = "auto") -> None:
        settings = RouterSettings(policy=policy, disagg=disagg)
        self.membership = Membership()
        self.placement = Placement(policy, disagg, Random(0))
        self.dispatcher = Dispatcher(settings, self.membership, self.placement, Random(0), 0.0)
        self.registrations: dict[str, Registration] = {}
        for name in ("w0", "w1"):
            self.up(name)
        self.caches("w0")

    def up(self, name: str, role: Role = Role.AGGREGATED, **fields: Any) -> None:
        it = card(name, role, total_blocks=1000, **{"block_size": BLOCK_SIZE, **fields})
        self.registrations[name] = builders.registration(name, role=role)
        self.membership.discovered(self.registrations)
        self.membership.up(name, it)
        self.membership.loaded(name)
        self.membership.elect()
        self.placement.snapshot(name, [], first=True)
        self.placement.up(it, Load(total_blocks=1000, rates=RATES))

    def caches(self, name: str) -> None:
        self.placement.cache_changed(name, HASHES, [], False)

    def load(self, name: str, **fields: int) -> None:
        self.placement.reported(name, 0, Load(total_blocks=1000, rates=RATES, **fields), 0.0)

    def holder(self) -> Holder | None:
        """Who would have most of the prompt, and be passed over."""
        (placing,) = self.dispatcher.foresee(REQUEST, 1.0).placings()
        return placing.holder

    def passed_over(self) -> PassedOver | None:
        holder = self.holder()
        if holder is None:
            return None
        assert holder.tokens == len(PROMPT) - BLOCK_SIZE  # the last block is computed in any case
        return holder.passed_over


def test_a_worker_that_is_chosen_for_what_it_has_is_not_passed_over() -> None:
    assert Graph().holder() is None


def test_a_busy_worker_is_costlier() -> None:
    graph = Graph()
    graph.load("w0", prefill_tokens=50_000, running=1)
    assert graph.passed_over() is PassedOver.COSTLIER


def test_a_worker_that_refused_an_attempt_is_full_until_then() -> None:
    graph = Graph()
    graph.dispatcher.refused("w0", 2.0)
    assert graph.passed_over() is PassedOver.FULL
    graph.dispatcher.refused("w0", 1.0)
    assert graph.holder() is None


def test_a_worker_that_stands_still_is_not_ready() -> None:
    graph = Graph()
    graph.membership.stuck("w0", "no step")
    graph.membership.elect()
    assert graph.passed_over() is PassedOver.NOT_READY


def test_a_worker_with_a_request_that_may_kill_engines_is_kept_apart() -> None:
    graph = Graph()
    graph.dispatcher.suspects.note("another", 9, "w0")
    assert graph.passed_over() is PassedOver.SUSPECT


def test_a_worker_whose_events_are_wrong_holds_only_what_was_sent_there() -> None:
    graph = Graph()
    for _ in range(MIN_OBSERVATIONS):
        verdict = graph.placement.overlap_check.observe("w0", 640, 0, BLOCK_SIZE)
    graph.placement._judged("w0", verdict)
    graph.load("w0", prefill_tokens=50_000, running=1)
    assert graph.holder() is None
    graph.placement.approximate.used("w0", HASHES)
    assert graph.passed_over() is PassedOver.COSTLIER


def test_a_worker_that_the_policy_did_not_draw_was_not_asked() -> None:
    graph = Graph(policy="round-robin")
    placed = [graph.passed_over()]
    graph.placement._ordinal += 1
    placed.append(graph.passed_over())
    assert set(placed) == {None, PassedOver.NOT_ASKED}


@pytest.mark.parametrize(
    ("disagg", "layout", "expected"),
    [
        ("never", "", PassedOver.NO_PREFILL),
        ("auto", "other", PassedOver.OTHER_FORMAT),
        ("auto", "", PassedOver.COSTLIER),
    ],
)
def test_a_prefill_worker_is_passed_over_for_what_it_is(
    disagg: str, layout: str, expected: PassedOver
) -> None:
    graph = Graph(disagg=disagg)
    for name in ("w0", "w1"):
        graph.placement.down(name)
        graph.membership.down(name)
    graph.up("d0", Role.DECODE)
    graph.up("p0", Role.PREFILL, layout=layout)
    graph.caches("p0")
    graph.load("p0", prefill_tokens=500_000, running=1)
    assert graph.passed_over() is expected


def test_a_worker_where_an_attempt_failed_is_avoided_and_the_reason_is_kept() -> None:
    graph = Graph()
    dispatcher = graph.dispatcher
    record = dispatcher.submit(REQUEST, None, 1.0)
    assert isinstance(record, RequestRecord)

    def send(effects: list[Effect]) -> str:
        (attempt,) = [effect for effect in effects if isinstance(effect, SendAttempt)]
        dispatcher.sent(record, attempt.instance_id, 1, attempt.attempt, 1.0)
        return attempt.attempt.attempt_id

    first = send(dispatcher.place(record, 1.0))
    failed = Output(first, [], FinishReason.ERROR, error="a step failed")
    send(dispatcher.output(record, failed, 2.0))
    before, after = record.routed.placings()
    assert before.holder is None
    assert after.decision.decode == "w1"
    assert after.retried_because == "w0: a step failed"
    assert after.holder is not None
    assert after.holder.passed_over is PassedOver.AVOIDED


def test_nobody_is_passed_over_for_a_prompt_that_is_computed_whole() -> None:
    graph = Graph()
    graph.load("w0", prefill_tokens=50_000, running=1)
    sampling = Sampling(max_tokens=4, prompt_logprobs=0)
    whole = Request("r-0", REQUEST.model, PROMPT, sampling)
    (placing,) = graph.dispatcher.foresee(whole, 1.0).placings()
    assert placing.holder is None


def test_a_cache_that_is_void_holds_nothing() -> None:
    graph = Graph()
    graph.placement.cache_changed("w0", [], HASHES, False)
    with pytest.raises(ProtocolError):
        graph.placement.cache_changed("w0", [], HASHES[:1], False)
    assert graph.holder() is None
