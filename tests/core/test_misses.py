"""Where cached prompts were lost, and to what."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest

from penstock.core import misses
from penstock.core.attempt_times import AttemptTimes
from penstock.core.decision_record import DecisionRecord, Holder, PassedOver, RoutedRequest
from penstock.core.misses import MissCause, Misses, MissReport
from tests.decisions import candidate, decided, placing, request

PROMPT = 13_000
NOBODY: Mapping[str, str] = MappingProxyType({})
MOST = 12_992  # its last block is computed in any case


class History:
    """A record, filled request by request. Time goes on by a second with each."""

    def __init__(self) -> None:
        self.record = DecisionRecord()
        self.now = 0.0

    def ask(
        self,
        worker: str = "w1",
        *,
        found: int | None = 0,
        predicted: int = 0,
        holder: Holder | None = None,
        hashes: range = range(1, 813),
        **fields: Any,
    ) -> RoutedRequest:
        """A request of 812 blocks that this worker computed."""
        self.now += 1.0
        name = f"c{self.now:.0f}-0"
        attempts = [AttemptTimes(f"{name}.1", worker, False, 0.0, 0.0, "", 0.1, found)]
        it = self.record.came(request(name, PROMPT, **fields), attempts, self.now, 0.0)
        busy = [candidate(holder.instance_id, queued=50_000)] if holder is not None else []
        decision = decided(candidate(worker), *busy)
        it_placed = placing(decision, holder, at=self.now, cached_tokens=predicted)
        self.record.placed(it, it_placed, hashes, 16)
        return it

    def report(
        self, *, since: float = 0.0, distrusted: Mapping[str, str] = NOBODY, tenant: str = ""
    ) -> Misses:
        report = MissReport(since, "kv", 1000.0, self.record.lost, distrusted)
        for it in self.record:
            report.add(it, counts=it.request.tenant == tenant)
        return report.result()

    def causes(self, **options: Any) -> list[tuple[str, str, int]]:
        return [(it.cause, it.worker, it.tokens) for it in self.report(**options).causes]


@pytest.fixture
def history() -> History:
    return History()


def test_a_prompt_that_nobody_had_is_cold(history: History) -> None:
    history.ask()
    told = history.report()
    assert told.causes == [MissCause("cold", "", MOST, 1)]
    assert (told.cold_tokens, told.lost_tokens, told.worst) == (MOST, 0, [])


def test_a_prompt_that_was_found_lost_nothing(history: History) -> None:
    history.ask(found=MOST, predicted=MOST)
    told = history.report()
    assert (told.causes, told.cached_tokens, told.prompt_tokens) == ([], MOST, PROMPT)


def test_what_was_predicted_and_not_found_was_evicted_meanwhile(history: History) -> None:
    history.ask(found=1600, predicted=8000)
    assert history.causes() == [("evicted_meanwhile", "w1", 6400), ("cold", "", MOST - 8000)]


@pytest.mark.parametrize("passed_over", PassedOver)
def test_what_a_passed_over_worker_had_is_lost_to_the_reason(
    history: History, passed_over: PassedOver
) -> None:
    history.ask(found=1600, predicted=1600, holder=Holder("w9", 12_000, passed_over))
    (first, second) = history.report().causes
    assert (first.cause, first.worker, first.tokens) == (passed_over.value, "w9", 10_400)
    assert (first.later_ms is not None) == (passed_over is PassedOver.COSTLIER)
    assert second.cause == "cold"


def test_the_report_says_by_how_much_the_holder_was_later(history: History) -> None:
    history.ask(holder=Holder("w9", 12_000, PassedOver.COSTLIER))
    (first, _) = history.report().causes
    assert first.later_ms is not None
    assert 4000 < first.later_ms < 6000  # 50,000 tokens of 0.1 ms are before it there


def test_what_another_worker_had_computed_and_was_lost_with_it(history: History) -> None:
    history.ask("w1")
    history.record.worker_lost("w1", "killed", history.now + 0.5)
    history.ask("w2")
    told = history.report(since=2.0)
    assert [(it.cause, it.worker) for it in told.causes] == [("worker_lost", "w1"), ("cold", "")]
    assert told.causes[0].tokens >= MOST * 7 / 8


def test_what_a_worker_had_computed_that_is_still_there_was_evicted(history: History) -> None:
    history.record.worker_lost("w1", "killed", 0.5)  # before it computed that
    history.ask("w1")
    history.ask("w2")
    assert history.causes(since=2.0)[0][:2] == ("evicted", "w1")


def test_what_a_distrusted_worker_had_computed_is_lost_to_its_events(history: History) -> None:
    history.ask("w1")
    history.ask("w2")
    assert history.causes(since=2.0, distrusted={"w1": "events_off"})[0][:2] == ("distrusted", "w1")
    assert history.report(distrusted={"w1": "events_off"}).distrusted == {"w1": "events_off"}


def test_one_worker_of_several_that_computed_it_and_is_still_there_has_evicted_it(history: History) -> None:
    history.ask("w1")
    history.ask("w2", found=MOST, predicted=MOST)
    history.record.worker_lost("w2", "killed", history.now + 0.5)
    history.ask("w3")
    assert history.causes(since=3.0)[0][:2] == ("evicted", "w1")


def test_a_shared_prefix_counts_as_far_as_it_is_shared(history: History) -> None:
    history.ask("w1", hashes=range(1, 401))
    history.ask("w2", hashes=range(1, 813))
    (evicted,) = [tokens for cause, _, tokens in history.causes(since=2.0) if cause == "evicted"]
    assert 400 * 16 * 7 / 8 <= evicted <= 400 * 16


def test_a_prompt_that_is_computed_whole_for_its_log_probabilities_is_no_loss(history: History) -> None:
    it = history.ask()
    assert it.kept
    whole = history.ask(sampling=request().sampling.__class__(max_tokens=1, prompt_logprobs=1))
    assert whole.request.whole_prompt
    told = history.report(since=2.0)
    assert [(it.cause, it.tokens) for it in told.causes] == [("whole_prompt", PROMPT)]
    assert told.lost_tokens == 0


def test_only_requests_of_the_time_and_the_tenant_count_but_all_teach(history: History) -> None:
    history.ask("w1", tenant="other")
    history.ask("w2")
    history.ask("w2", found=None)  # whose engine has not answered yet
    told = history.report(since=1.5)
    assert told.requests == 1
    assert told.causes[0].cause == "evicted"


def test_the_worst_requests_come_first_and_are_few(history: History) -> None:
    for number in range(1, 30):
        history.ask(predicted=16 * number * 10, hashes=range(1000 * number, 1000 * number + 812))
    worst = history.report().worst
    assert len(worst) == misses.WORST_REQUESTS
    assert [it.lost_tokens for it in worst] == sorted((it.lost_tokens for it in worst), reverse=True)
    assert worst[0].request_id == "c29-0"
    assert "went to w1" in worst[0].summary


def test_prefixes_beyond_the_limit_are_forgotten(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(misses, "MAX_PREFIXES", 100)
    for number in range(5):
        history.ask("w1", hashes=range(1 + 10_000 * number, 813 + 10_000 * number))
    history.ask("w2")
    assert history.causes(since=6.0) == [("cold", "", MOST)]
