"""The search, on formulas in place of simulations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from penstock.plan.candidates import forms, layouts
from penstock.plan.kinds import worker_kinds
from penstock.plan.objective import Objective
from penstock.plan.search import SEEDS, Ran, Search, part
from penstock.simulate.arrivals import RateRange
from penstock.simulate.run import Scenario, WorkloadSettings
from tests.plan.reports import report

KINDS = worker_kinds("qwen3-32b/h200")
OBJECTIVE = Objective.parse("ttft=2s,itl=25ms")
RATE = WorkloadSettings(generator="prompts", rate=RateRange(10.0, 10.0), duration_s=6000.0)


class Formula:
    """A Runner without simulations. Prefill workers bear three times as much as decode workers, aggregated
    ones 0.7 times, workers of one GPU 0.4 times; 1,000 s of load take a second of CPU."""

    def __init__(self, load: float, missed: str = "ttft_met_share", floor: float = 1.0) -> None:
        self.load = load  # at scale 1, in workers
        self.missed = missed
        self.floor = floor  # the good share of a graph without load
        self.ran: list[Scenario] = []

    def __call__(self, what: str, scenarios: Sequence[Scenario]) -> list[Ran]:
        self.ran += scenarios
        return [self._run(it) for it in scenarios]

    def _run(self, scenario: Scenario) -> Ran:
        graph = scenario.graph
        bears = 0.7 * graph.aggregated + min(3 * graph.prefill, graph.decode)
        bears *= 0.4 if graph.cost_model.endswith("tp1") else 1.0
        if self.missed == "cache" and graph.cache_tokens > 2_000_000:
            bears *= 10
        share = min(self.floor, bears / (self.load * scenario.scale))
        others = {self.missed: share} if self.missed.endswith("share") else {}
        return Ran(report(share, **others), scenario.load.duration_s * scenario.scale / 1000)


def test_the_layout_that_bears_most_is_best() -> None:
    run = Formula(load=8.0)
    search = Search(RATE, OBJECTIVE, run, budget_cpu_s=2000.0)
    advice = search.best(layouts(KINDS, 32), ["kv", "sticky"])
    best = advice[0]
    assert (best.candidate.kind.gpus, best.candidate.prefill, best.candidate.decode) == (2, 4, 12)
    assert best.margin is not None
    assert best.margin.mean == pytest.approx(12 / 8 / 0.9, rel=0.1)
    assert best.meets
    assert best.breaks == "TTFT"
    margins = [it.margin.mean if it.margin is not None else 0.0 for it in advice]
    assert margins == sorted(margins, reverse=True)
    assert {it.candidate.policy for it in advice} == {"kv", "sticky"}


def test_few_candidates_get_much_of_the_load_and_many_get_little() -> None:
    run = Formula(load=8.0)
    search = Search(RATE, OBJECTIVE, run, budget_cpu_s=400.0)
    search.best(layouts(KINDS, 32), ["kv"])
    durations_s = [it.load.duration_s for it in run.ran[1:]]
    assert durations_s[0] == min(durations_s)
    assert durations_s[0] < durations_s[-1] / 4


@pytest.mark.parametrize("budget_cpu_s", [50.0, 400.0])
def test_the_budget_is_kept(budget_cpu_s: float) -> None:
    run = Formula(load=8.0)
    search = Search(RATE, OBJECTIVE, run, budget_cpu_s)
    search.best(layouts(KINDS, 32), ["kv", "sticky"])
    assert search.spent_cpu_s < 1.3 * budget_cpu_s


def test_a_large_budget_gives_the_whole_load_with_several_seeds() -> None:
    run = Formula(load=8.0)
    search = Search(RATE, OBJECTIVE, run, budget_cpu_s=1e6)
    advice = search.best(layouts(KINDS, 8), ["kv"])
    assert (search.piece, search.seeds) == (1.0, SEEDS)
    assert all(len(it.reports) == len(it.margins) == SEEDS for it in advice)
    assert {it.seed for it in run.ran} == set(range(SEEDS))


def test_another_seed_gives_other_loads() -> None:
    run = Formula(load=8.0)
    Search(RATE, OBJECTIVE, run, budget_cpu_s=1e6, seed=7).best(layouts(KINDS, 8), ["kv"])
    assert {it.seed for it in run.ran} == {7, 8, 9}


def test_more_seeds_go_before_more_of_the_load() -> None:
    search = Search(RATE, OBJECTIVE, Formula(load=8.0), budget_cpu_s=200.0)
    search.best(layouts(KINDS, 8), ["kv"])
    assert search.seeds == SEEDS
    assert search.piece < 1.0


@pytest.mark.parametrize(
    ("missed", "breaks"),
    [("ttft_met_share", "TTFT"), ("itl_met_share", "ITL"), ("cache", "KV cache")],
)
def test_what_breaks_first_is_named(missed: str, breaks: str) -> None:
    search = Search(RATE, OBJECTIVE, Formula(load=8.0, missed=missed), budget_cpu_s=2000.0)
    assert search.best(layouts(KINDS, 16), ["kv"])[0].breaks == breaks


def test_the_fewest_gpus_that_suffice_are_found() -> None:
    search = Search(RATE, OBJECTIVE, Formula(load=10.0), budget_cpu_s=5000.0)
    advice = search.fewest(forms(KINDS), ["kv"])
    assert advice[0].meets
    assert (advice[0].candidate.prefill, advice[0].candidate.decode) == (3, 9)
    assert advice[0].margin is not None
    assert advice[0].margin.mean == pytest.approx(1.0, rel=0.1)
    gpus = [it.candidate.gpus for it in advice if it.meets]
    assert gpus == sorted(gpus)


def test_no_graph_is_found_where_even_idle_ones_are_too_slow() -> None:
    search = Search(RATE, OBJECTIVE, Formula(load=1.0, floor=0.8), budget_cpu_s=1000.0)
    assert search.fewest(forms(KINDS), ["kv"]) == []


def test_a_graph_that_never_meets_the_objective_is_said_to_bear_nothing() -> None:
    run = Formula(load=1.0, floor=0.8, missed="itl_met_share")
    best = Search(RATE, OBJECTIVE, run, budget_cpu_s=1000.0).best(layouts(KINDS, 4), ["kv"])[0]
    assert (best.meets, best.margin, best.breaks) == (False, None, "ITL")


def test_parts_of_loads_are_their_beginnings() -> None:
    trace = WorkloadSettings(trace=Path("some.jsonl"), requests=1000)
    assert part(RATE, 0.5).duration_s == 3000.0
    assert part(RATE, 0.001).duration_s == 60.0
    assert part(trace, 0.25).requests == 250
