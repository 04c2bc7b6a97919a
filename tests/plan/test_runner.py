"""Simulations in several processes."""

from __future__ import annotations

import msgspec

from penstock.bench.measurements import Slo
from penstock.core.settings import RouterSettings
from penstock.plan.runner import Processes
from penstock.simulate.arrivals import RateRange
from penstock.simulate.report import SimulationReport
from penstock.simulate.run import Scenario, SimulatedGraph, WorkloadSettings

LOAD = WorkloadSettings(generator="prompts", rate=RateRange(2.0, 2.0), duration_s=5.0)
SCENARIOS = [
    Scenario(LOAD, SimulatedGraph(aggregated=1), RouterSettings(), Slo(2000, 25), scale, 0)
    for scale in (0.5, 1.0, 2.0)
]


def simulated(jobs: int) -> list[SimulationReport]:
    with Processes(jobs, 10.0) as run:
        ran = run("small ones", SCENARIOS)
    assert all(it.cpu_s > 0 for it in ran)
    return [msgspec.structs.replace(it.report, cpu_s=0.0) for it in ran]


def test_two_processes_give_the_same_as_one_in_the_same_order() -> None:
    alone = simulated(1)
    assert [it.scale for it in alone] == [0.5, 1.0, 2.0]
    assert simulated(2) == alone
