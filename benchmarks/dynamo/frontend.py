"""The CPU time of both frontends' processes for the scenarios of benchmarks/frontend_cpu.py."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterable
from pathlib import Path
from statistics import median

import msgspec

from benchmarks.dynamo.graphs import Graph, dynamo, english_model, penstock
from benchmarks.dynamo.timing import PACE
from benchmarks.frontend_cpu import SCENARIOS, Bench, Cost, Measured

WORKERS = 2
PACED_WHOLE = ("whole answers 32 x 100",)
"""At an H200's pace here: as fast as they can, a mocker's workers would take what is left of two cores."""


class CpuCost(msgspec.Struct):
    """What one scenario took of one frontend's CPU, in each round: microseconds a token or request."""

    scenario: str
    unit: str
    system: str
    user_us: list[float]
    system_us: list[float]
    tokens_per_chunk: float

    @property
    def us(self) -> list[float]:
        """Of each round."""
        return [user + system for user, system in zip(self.user_us, self.system_us, strict=True)]

    @property
    def median_us(self) -> float:
        return median(self.us)


def measure_cpu(only: str, rounds: int) -> Iterable[CpuCost]:
    """The scenarios whose name contains `only`. Both graphs run, and are asked by turns: what else the
    machine does comes to both alike."""
    with tempfile.TemporaryDirectory() as folder:
        model = english_model(Path(folder))
        for name, measured in SCENARIOS.items():
            if only not in name:
                continue
            costs = None if measured.cost_model == "zero" and name not in PACED_WHOLE else PACE
            with dynamo(model, WORKERS, costs) as its, penstock(model, WORKERS, costs) as ours:
                yield from asyncio.run(_by_turns(name, measured, (its, ours), rounds))


async def _by_turns(
    name: str, measured: Measured, graphs: tuple[Graph, Graph], rounds: int
) -> list[CpuCost]:
    benches = [Bench(graph.url, graph.pid) for graph in graphs]
    costs: list[list[Cost]] = [[], []]
    for bench in benches:
        await bench.chat(["warm up"], 50)
        await bench.measure(measured.run)  # not counted: of both, what is made once is made here
    for number in range(rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            costs[which].append(await benches[which].measure(measured.run))
    for bench in benches:
        await bench.client.close()
    return [_cost(name, measured.unit, graph.name, its) for graph, its in zip(graphs, costs, strict=True)]


def _cost(scenario: str, unit: str, system: str, costs: list[Cost]) -> CpuCost:
    units = [cost.tokens if unit == "token" else cost.requests for cost in costs]
    return CpuCost(
        scenario=scenario,
        unit=unit,
        system=system,
        user_us=[1e6 * cost.user_s / n for cost, n in zip(costs, units, strict=True)],
        system_us=[1e6 * cost.system_s / n for cost, n in zip(costs, units, strict=True)],
        tokens_per_chunk=sum(cost.tokens for cost in costs) / max(1, sum(cost.chunks for cost in costs)),
    )
