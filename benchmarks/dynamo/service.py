"""What clients get of both, and what `penstock simulate` foretells of each: the same sessions at the same
times, to workers of the same timing (timing.py), and to the simulation of them."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path

import msgspec

from benchmarks.dynamo.graphs import ENGINE, SCHEDULER, Graph, character_model, dynamo, penstock
from benchmarks.dynamo.timing import COMMON, write_penstock
from benchmarks.simulated import Clients
from penstock.bench.measurements import Slo
from penstock.core.settings import RouterSettings
from penstock.simulate.arrivals import RateRange
from penstock.simulate.report import SimulationReport
from penstock.simulate.run import Scenario, SimulatedGraph, WorkloadSettings

SLO = Slo(1000.0, 40.0)
POLICIES = {"Penstock": "kv", "Dynamo": "dynamo"}
"""By which the simulation places requests: Penstock's default, and what it has of Dynamo's."""


class Load(msgspec.Struct, frozen=True):
    """A load, how many workers it is for, and what it is multiplied by."""

    settings: WorkloadSettings
    workers: int
    scales: tuple[float, ...]
    unit: str  # of scale 1


LOADS: Mapping[str, Load] = {
    "chat": Load(
        WorkloadSettings(generator="chat", users=40, lengths={"prompt_tokens": 600, "output_tokens": 80}),
        workers=4,
        scales=(1.0, 2.0, 3.0, 4.0),
        unit="40 users",
    ),
    "shared-prefix": Load(
        WorkloadSettings(
            generator="shared-prefix",
            rate=RateRange(2.0, 2.0),
            lengths={"prompt_tokens": 400, "output_tokens": 60},
        ),
        workers=4,
        scales=(1.0, 2.0, 3.0, 4.0),
        unit="2 requests/s",
    ),
    "one worker": Load(
        WorkloadSettings(
            generator="prompts",
            rate=RateRange(1.0, 1.0),
            lengths={"prompt_tokens": 1000, "output_tokens": 50},
        ),
        workers=1,
        scales=(1.0, 2.0, 3.0, 4.0),
        unit="1 request/s",
    ),
}
"""All within what two cores can do beside the processes; the last has no routing in it, for the engines
alone."""


class Served(msgspec.Struct):
    """One load at one scale and seed, to one system."""

    load: str
    system: str
    measured: SimulationReport
    simulated: SimulationReport
    frontend_cpu_s: float
    late_s: float  # the most by which a session began late

    def key(self) -> tuple[str, str, float, int]:
        """What was measured."""
        return self.load, self.system, self.measured.scale, self.measured.seed

    def line(self) -> str:
        """For who waits."""
        it = self.measured
        return (
            f"{self.load:14} x {it.scale:g}, seed {it.seed} {self.system:9} {it.requests:5} requests, "
            f"{100 * it.good_share:5.1f} % good, TTFT p50 {it.ttft_ms.p50 or 0:6.0f} ms, "
            f"{100 * it.cached_share:5.1f} % cached, frontend {self.per_request_ms():5.2f} ms a request, "
            f"sessions up to {1e3 * self.late_s:.0f} ms late"
        )

    def per_request_ms(self) -> float:
        """Of the frontend's CPU time."""
        return 1e3 * self.frontend_cpu_s / max(1, self.measured.requests)


class Runs(msgspec.Struct, frozen=True):
    """How loads are sent."""

    seeds: int
    duration_s: float  # of each, in the timing's own time
    slowness: float  # of the processes; figures are in the timing's own time
    scales: tuple[float, ...]  # empty: all of each load


def measure_service(only: str, runs: Runs) -> Iterable[Served]:
    """The loads whose name contains `only`, each at each scale with each seed. The systems take turns; each
    time all processes are new."""
    with tempfile.TemporaryDirectory() as folder:
        model = character_model(Path(folder))
        costs = Path(folder) / "costs.json"
        write_penstock(COMMON, costs)
        for name, load in LOADS.items():
            if only not in name:
                continue
            settings = msgspec.structs.replace(load.settings, duration_s=runs.duration_s)
            for scale, seed in product(runs.scales or load.scales, range(runs.seeds)):
                for start in (dynamo, penstock) if seed % 2 else (penstock, dynamo):
                    with start(model, load.workers, COMMON, runs.slowness) as graph:
                        clients = Clients(graph.url, runs.slowness, SLO)
                        served = asyncio.run(_served(name, settings, graph, clients, scale, seed))
                    served.simulated = _simulated(
                        load.workers, settings, str(costs), served.system, scale, seed
                    )
                    yield served


async def _served(
    name: str, settings: WorkloadSettings, graph: Graph, clients: Clients, scale: float, seed: int
) -> Served:
    before_s = sum(graph.cpu_s())
    report = await clients.play(settings.load(scale, seed))
    report.scale, report.seed = scale, seed
    return Served(name, graph.name, report, report, sum(graph.cpu_s()) - before_s, clients.late_s)


def _simulated(
    workers: int, settings: WorkloadSettings, costs: str, system: str, scale: float, seed: int
) -> SimulationReport:
    graph = SimulatedGraph(
        aggregated=workers,
        cost_model=costs,
        cache_tokens=ENGINE.total_blocks * ENGINE.block_size,
        block_size=ENGINE.block_size,
        max_model_len=ENGINE.max_model_len,
        scheduler=SCHEDULER,
    )
    return Scenario(settings, graph, RouterSettings(POLICIES[system]), SLO, scale, seed).run()
