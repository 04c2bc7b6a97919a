"""Whole runs: what they report, and that every request comes to its end."""

from __future__ import annotations

import msgspec
import pytest

from penstock.bench.measurements import Slo
from penstock.core.admission import AdmissionSettings
from penstock.core.attempt_phases import EngineTimes
from penstock.core.policies import POLICIES
from penstock.core.settings import RouterSettings
from penstock.simulate.arrivals import RateRange
from penstock.simulate.report import SimulationReport
from penstock.simulate.run import Scenario, SimulatedGraph, Simulation, WorkloadSettings

CHAT = WorkloadSettings(
    generator="chat",
    rate=RateRange(1.0, 1.0),
    duration_s=60.0,
    lengths={"prompt_tokens": 600, "output_tokens": 80, "shared_tokens": 500},
)
GRAPH = SimulatedGraph(aggregated=4, cache_tokens=60_000)


def run(
    load: WorkloadSettings = CHAT,
    graph: SimulatedGraph = GRAPH,
    policy: str = "kv",
    seed: int = 0,
    scale: float = 1.0,
    **router: object,
) -> SimulationReport:
    settings = msgspec.structs.replace(RouterSettings(policy=policy), **router)
    return Scenario(load, graph, settings, Slo(1000, 25), scale, seed).run()


def test_equal_scenarios_give_equal_reports() -> None:
    first, second, other = (msgspec.structs.replace(run(seed=seed), cpu_s=0.0) for seed in (1, 1, 2))
    assert first == second
    assert first != other
    assert not first.errors


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_serves_everything(policy: str) -> None:
    report = run(policy=policy)
    assert report.requests > 100
    assert not report.errors
    assert 0 < report.cached_share < 1
    assert report.computing_share > 0


def test_the_default_policy_finds_more_in_caches_than_round_robin() -> None:
    ours, theirs = run(), run(policy="round-robin")
    assert ours.cached_share > theirs.cached_share + 0.1
    assert ours.ttft_ms.mean is not None
    assert theirs.ttft_ms.mean is not None
    assert ours.ttft_ms.mean < theirs.ttft_ms.mean


@pytest.mark.parametrize("disagg", ["auto", "always", "never"])
def test_prefill_workers_hand_prompts_over(disagg: str) -> None:
    graph = msgspec.structs.replace(GRAPH, aggregated=0, prefill=3, decode=2)
    report = run(graph=graph, disagg=disagg)
    assert not report.errors
    assert report.requests > 100


def test_prompts_do_not_wait_for_prefill_workers_that_are_too_few() -> None:
    """Of these one prefill worker can compute a part only, and decode workers can compute the others."""
    lengths = {"prompt_tokens": 4000, "output_tokens": 100}
    load = msgspec.structs.replace(CHAT, generator="prompts", rate=RateRange(11.0, 11.0), lengths=lengths)
    report = run(load, SimulatedGraph(aggregated=0, prefill=1, decode=2))
    assert not report.errors
    assert (report.ttft_ms.mean or 0) < 1000


def test_more_users_wait_longer() -> None:
    load = msgspec.structs.replace(CHAT, rate=None, users=4)
    few, many = run(load), run(load, scale=30)
    assert many.requests > 3 * few.requests
    assert (many.itl_ms.mean or 0) > (few.itl_ms.mean or 0)


def test_what_would_wait_too_long_is_refused_and_reported() -> None:
    load = msgspec.structs.replace(CHAT, rate=RateRange(40.0, 40.0), duration_s=30.0)
    report = run(load, admission=AdmissionSettings(max_wait_ms=200.0))
    assert report.errors.keys() == {"refused (wait)"}
    assert report.good_share < 1


def test_sessions_stay_on_their_worker_with_session_affinity() -> None:
    """Each turn then finds the session's last one cached."""
    scenario = Scenario(CHAT, GRAPH, RouterSettings(policy="session-affinity"), Slo(1000, 25), 1.0, 0)
    simulation = Simulation(scenario)
    simulation.run()
    workers: dict[str, set[str]] = {}
    for routed in simulation.decisions:
        for placing in routed.placings():
            session = placing.decision.query.session
            workers.setdefault(session, set()).add(placing.decision.decode)
    named = [found for session, found in workers.items() if session]
    assert len(named) > 30
    assert all(len(found) == 1 for found in named)
    assert len(set.union(*named)) == 4


def test_phases_of_engines_add_up_to_when_the_first_output_came() -> None:
    graph = msgspec.structs.replace(GRAPH, aggregated=0, prefill=3, decode=2)
    simulation = Simulation(Scenario(CHAT, graph, RouterSettings(), Slo(1000, 25), 1.0, 0))
    simulation.run()
    attempts = [attempt for routed in simulation.decisions for attempt in routed.attempts]
    assert sum(not attempt.prefill_only for attempt in attempts) > 100
    for attempt in attempts:
        assert attempt.took is not None
        assert attempt.first_output_s is not None
        took = EngineTimes(*attempt.took)
        told_ms = took.queue_ms + took.transfer_ms + took.prefill_ms
        assert told_ms == pytest.approx((attempt.first_output_s - attempt.sent_s) * 1e3)


def test_users_who_are_refused_wait_before_they_ask_again() -> None:
    """One worker that is far too small for them: a refusal takes no time."""
    load = WorkloadSettings(generator="prompts", users=60, duration_s=20.0)
    router = RouterSettings(admission=AdmissionSettings(max_wait_ms=500.0))
    report = Scenario(load, SimulatedGraph(aggregated=1), router, Slo(500, 20), 1.0, 0).run()
    assert 60 <= sum(report.errors.values()) <= 60 * 20
