"""What decisions predict is what then happens: the real router over virtual engines, on virtual time."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from benchmarks.predictions import phase_errors
from penstock.bench.measurements import Slo
from penstock.core.explanation import explained
from penstock.core.settings import RouterSettings
from penstock.simulate.arrivals import RateRange
from penstock.simulate.run import Scenario, SimulatedGraph, Simulation, WorkloadSettings

AGGREGATED = SimulatedGraph(aggregated=2)
DISAGGREGATED = SimulatedGraph(aggregated=0, prefill=1, decode=1)
LIMITS = {"queue": 0.15, "prefill": 0.15, "transfer": 0.15, "decode": 0.15, "first_token": 0.20}
"""Of the median error of each phase."""

PROMPTS_TO_COME = {"decode": 0.30}
"""Where prompts are computed between tokens: by those that come later, which nobody knows yet."""

HANDOFFS_TO_COME = {"transfer": 0.35}
"""Where a prefill worker often sends the KV of one prompt after that of another."""


def explanations(graph: SimulatedGraph, sessions_per_s: float) -> list[dict[str, Any]]:
    """What /v1/explain would say of the requests of a load, but for the first fifth of them, before which
    workers have not measured anything."""
    load = WorkloadSettings(
        generator="chat",
        rate=RateRange(sessions_per_s, sessions_per_s),
        duration_s=100.0,
        lengths={"prompt_tokens": 2000, "output_tokens": 200},
    )
    simulation = Simulation(Scenario(load, graph, RouterSettings(), Slo(2000, 25), 1.0, 0))
    simulation.run()
    decisions = list(simulation.decisions)
    latest = decisions[len(decisions) // 5 :]
    return [msgspec.to_builtins(explained(routed, "kv", 0.0)) for routed in latest]


@pytest.mark.parametrize(
    ("graph", "sessions_per_s", "exceptions"),
    [
        pytest.param(AGGREGATED, 0.5, {}, id="aggregated"),
        pytest.param(AGGREGATED, 2.0, PROMPTS_TO_COME, id="aggregated, near saturation"),
        pytest.param(DISAGGREGATED, 0.5, {}, id="disaggregated"),
        pytest.param(DISAGGREGATED, 1.0, HANDOFFS_TO_COME, id="disaggregated, near saturation"),
    ],
)
def test_what_was_predicted_is_what_happened(
    graph: SimulatedGraph, sessions_per_s: float, exceptions: dict[str, float]
) -> None:
    errors = phase_errors(explanations(graph, sessions_per_s))
    assert errors.keys() == LIMITS.keys() - (set() if graph.prefill else {"transfer"})
    assert all(its.requests > 80 for its in errors.values())
    limits = LIMITS | exceptions
    assert {name: its for name, its in errors.items() if its.error > limits[name]} == {}
    assert {name: its for name, its in errors.items() if abs(its.bias) > 0.15} == {}
