"""What is kept of decisions, and what is said of them."""

from __future__ import annotations

import msgspec
import pytest

from penstock.core.attempt_times import AttemptTimes
from penstock.core.decision_record import (
    MAX_KEPT_PLANS,
    SAMPLED_BLOCKS,
    DecisionRecord,
    Holder,
    PassedOver,
    Placing,
    RoutedRequest,
)
from penstock.core.decision_words import decision_words
from penstock.core.explanation import ExplainedTimes, explained
from penstock.core.policy import Candidate, Decision
from penstock.shapes import Role
from tests.decisions import candidate, decided, placing, request


def routed(record: DecisionRecord, *placings: Placing, name: str = "c-0") -> RoutedRequest:
    attempts = [
        AttemptTimes(f"{name}.1", "w3", False, 0.5, 0.25, first_output_s=0.9, cached_tokens=16),
    ]
    it = record.came(request(name), attempts, 10.0, 100.0)
    for each in placings:
        record.placed(it, each, range(1, 800), 16)
    return it


def words(decision: Decision, holder: Holder | None = None, policy: str = "kv") -> str:
    it = routed(DecisionRecord())
    return decision_words(it.request, placing(decision, holder), policy)


def test_words_name_the_queue_of_the_worker_that_had_the_prompt() -> None:
    decision = decided(
        candidate("w1", cached=12_288, queued=19_000, running=1), candidate("w3", cached=9000)
    )
    said = words(decision, Holder("w1", 12_288, PassedOver.COSTLIER))
    assert said == (
        "went to w3 although w1 had 12,288 tokens of the prompt cached, because w1 had 1.9 s of prompts in "
        "its queue: first token predicted after 450 ms there, 2.0 s on w1"
    )


@pytest.mark.parametrize(
    ("passed_over", "said"),
    [
        (PassedOver.AVOIDED, "an attempt of this request had failed there"),
        (PassedOver.FULL, "w1 had just refused an attempt"),
        (PassedOver.SUSPECT, "kept apart"),
        (PassedOver.OTHER_FORMAT, "no decode worker reads the KV of w1"),
        (PassedOver.NO_PREFILL, "not to be used"),
        (PassedOver.NOT_READY, "took no new requests"),
        (PassedOver.NOT_ASKED, "the policy kv did not choose"),
    ],
)
def test_words_name_each_reason_for_passing_over_a_worker(passed_over: PassedOver, said: str) -> None:
    assert said in words(decided(candidate("w3")), Holder("w1", 64, passed_over))


@pytest.mark.parametrize(
    ("candidates", "said"),
    [
        ([candidate("w3", cached=64), candidate("w1")], "nobody had more of it cached (64 of 13,000"),
        ([candidate("w3")], "the only worker that could take it"),
        ([candidate("w3"), candidate("w1", queued=1000)], "on w1, the next best"),
        ([candidate("w3"), candidate("w1")], "drawn among equally cheap ones"),
    ],
)
def test_words_say_why_the_chosen_one_where_nobody_had_more(candidates: list[Candidate], said: str) -> None:
    assert said in words(decided(*candidates))


def test_words_name_both_workers_of_a_remote_prefill_and_the_path_not_taken() -> None:
    decision = decided(candidate("p0", Role.PREFILL), candidate("d1", Role.DECODE, running=8))
    said = words(decision)
    assert said.startswith("p0 computed its prompt and d1 its output")
    assert "(with the prefill worker" in said


def test_words_compare_prefill_workers() -> None:
    decision = decided(
        candidate("p0", Role.PREFILL),
        candidate("p1", Role.PREFILL, cached=12_288, queued=50_000),
        candidate("d1", Role.DECODE, running=8),
    )
    assert decision.prefill == "p0"
    said = words(decision, Holder("p1", 12_288, PassedOver.COSTLIER))
    assert "because p1 had 5.0 s of prompts in its queue" in said


def test_a_worker_whose_events_are_not_believed_is_named_with_the_cause() -> None:
    w1 = msgspec.structs.replace(candidate("w1", cached=12_288, queued=50_000), distrusted="events_off")
    decision = decided(w1, candidate("w3"))
    said = words(decision, Holder("w1", 12_288, PassedOver.COSTLIER))
    assert said.endswith(
        "; cached tokens only as far as they were sent there (w1: no cache events come from it)"
    )
    assert "only as far" not in words(decision), "w1 has no part in this"
    record = DecisionRecord()
    (told,) = explained(routed(record, placing(decision)), "kv", 0.0).decisions
    assert [it.distrusted for it in told.candidates] == [None, "events_off"]


def test_an_explanation_has_what_was_predicted_and_what_happened() -> None:
    record = DecisionRecord()
    it = routed(record, placing(decided(candidate("w1", running=2), candidate("w3", cached=64))))
    it.attempts[0].took = (5.0, 0.0, 390.0, 100.0)
    record.ended(it, 11.0, complete=True, output_tokens=7)
    told = explained(it, "kv", 1_000_000.0)
    assert (told.outcome, told.output_tokens, told.duration_ms) == ("complete", 7, 1000.0)
    assert told.created == 1_000_010.0
    (decision,) = told.decisions
    assert decision.predicted.cached_tokens == 64
    assert decision.predicted.frontend_ms == 100.0
    assert decision.actual == ExplainedTimes(16, 250.0, 5.0, 390.0, 0.0, 100.0, 400.0, 7)
    assert [(it.instance_id, it.chosen) for it in decision.candidates] == [("w3", True), ("w1", False)]
    assert set(decision.candidates[0].costs_ms) >= {"queue", "prefill", "inflicted", "transfer", "decode"}


def test_each_retry_has_its_own_attempts_and_reason() -> None:
    record, decision = DecisionRecord(), decided(candidate("w3"))
    it = routed(
        record,
        placing(decision),
        placing(decision, retried_because="w3: killed", avoided=frozenset({"w3"}), attempts_before=1),
    )
    it.attempts = [*it.attempts, AttemptTimes("c-0.2", "w3", False, 0.9)]
    record.ended(it, 11.0, complete=False, output_tokens=0, error="too often")
    told = explained(it, "kv", 0.0)
    assert [[it.attempt_id for it in each.attempts] for each in told.decisions] == [["c-0.1"], ["c-0.2"]]
    assert told.decisions[1].retried_because == "w3: killed"
    assert told.decisions[1].avoided == ["w3"]
    assert "tried again (w3: killed)" in told.summary
    assert (told.outcome, told.error) == ("failed", "too often")


@pytest.mark.parametrize("name", ["c", "mine", "c-0", "c-0.1"])
def test_a_request_is_found_by_each_of_its_names(name: str) -> None:
    record = DecisionRecord()
    for number in range(3):
        record.came(request(f"c{number or ''}-0", 5, client_id="mine" if not number else ""), [], 1.0, 0.0)
    assert [it.request.request_id for it in record.find(name)] == ["c-0"]


def test_a_call_that_began_again_is_found_with_all_its_beginnings() -> None:
    record = DecisionRecord()
    for call_id in ("c", "c-again2", "cd"):
        record.came(request(f"{call_id}-0", 5, call_id=call_id), [], 1.0, 0.0)
    assert [it.request.call_id for it in record.find("c")] == ["c", "c-again2"]


def test_the_oldest_requests_are_forgotten_beyond_the_count() -> None:
    record = DecisionRecord(max_requests=3)
    kept = [record.came(request(f"c{number}-0", 5), [], float(number), 0.0) for number in range(5)]
    assert list(record) == kept[2:]
    assert record.forgotten_at == 1.0


def test_bytes_are_limited_and_those_of_forgotten_requests_count_no_more() -> None:
    record = DecisionRecord(max_bytes=12_000)
    decision = decided(candidate("w1"), candidate("w2"))
    late = routed(record)
    for number in range(20):
        routed(record, placing(decision), name=f"d{number}-0")
    record.placed(late, placing(decision), range(1, 10), 16)  # which is forgotten by now
    assert record.bytes == sum(it.size for it in record) <= 12_000
    assert len(record) == 3
    assert late.kept


def test_few_plans_of_a_large_graph_are_kept_with_those_that_matter() -> None:
    record = DecisionRecord()
    decision = decided(
        candidate("best", cached=160),
        *(candidate(f"w{number}", running=number) for number in range(50)),
        candidate("holder", cached=12_000, queued=900_000),
    )
    it = routed(record, placing(decision, Holder("holder", 12_000, PassedOver.COSTLIER)))
    (kept,) = it.placings()
    names = {plan.instance_id for plan in kept.decision.plans}
    assert {"best", "holder"} < names
    assert len(names) <= MAX_KEPT_PLANS + 1
    assert kept.plans_left_out == 52 - len(names)
    assert it.size < 10_000


def test_workers_that_a_choice_among_many_left_out_are_counted() -> None:
    decision = msgspec.structs.replace(decided(candidate("w1"), candidate("w2")), plans_left_out=98)
    it = routed(DecisionRecord(), placing(decision))
    assert explained(it, "kv", 0.0).decisions[0].candidates_left_out == 98
    many = decided(*(candidate(f"w{number}") for number in range(MAX_KEPT_PLANS + 2)))
    many = msgspec.structs.replace(many, plans_left_out=98)
    it = routed(DecisionRecord(), placing(many))
    assert it.placings()[0].plans_left_out == 100


def test_only_hashes_of_some_prefixes_are_kept() -> None:
    it = routed(DecisionRecord(), placing(decided(candidate("w1"))))
    assert list(it.prefixes()) == [length for length in SAMPLED_BLOCKS if length < 800]
    assert len(it.prefixes()) < 60


def test_a_request_without_a_decision_says_that_it_waits_or_how_it_ended() -> None:
    record = DecisionRecord()
    it = routed(record)
    told = explained(it, "kv", 0.0)
    assert (told.outcome, told.summary, told.decisions) == ("waiting", "waits for a worker", [])
    record.ended(it, 11.0, complete=False, output_tokens=0)
    told = explained(it, "kv", 0.0)
    assert (told.outcome, told.summary) == ("cancelled", "ended before a worker was chosen")


def test_times_that_come_after_the_end_are_kept_as_well() -> None:
    record = DecisionRecord()
    it = routed(record, placing(decided(candidate("w3"))))
    record.ended(it, 11.0, complete=True, output_tokens=7)
    record.late("c-0.1", (1.0, 0.0, 2.0, 30.0))
    record.late("c-0.1", (9.0, 9.0, 9.0, 9.0))  # which were told
    record.late("other.1", (9.0, 9.0, 9.0, 9.0))
    assert explained(it, "kv", 0.0).decisions[0].actual.decode_ms == 30.0
