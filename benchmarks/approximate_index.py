"""How much of prompts is found cached when workers tell what they have, and when they do not.

    python benchmarks/approximate_index.py [--load chat] [--users 200] [--duration-s 150]
        [--cache-tokens 60000]

Simulated conversations (`penstock simulate`) over eight workers, three times: with cache events, with
none but the approximate index, and with neither. The last is what a router does that loses its events and
does not notice.
"""

from __future__ import annotations

import argparse
from typing import Any

import msgspec

from penstock.bench.measurements import Slo
from penstock.core.settings import RouterSettings
from penstock.ports import EngineStep
from penstock.shapes import Card
from penstock.simulate import run
from penstock.simulate.generators import GENERATORS
from penstock.simulate.router import SimulatedRouter


class WithoutEvents(SimulatedRouter):
    """Workers do not tell what they have cached."""

    def add_workers(self, workers: dict[str, tuple[Card, Any]]) -> None:
        for name, (card, engine) in workers.items():
            silent = msgspec.structs.replace(card.engine, kv_events=False)
            workers[name] = msgspec.structs.replace(card, engine=silent), engine
        super().add_workers(workers)

    def reported(self, instance_id: str, step: EngineStep) -> None:
        super().reported(instance_id, msgspec.structs.replace(step, stored=[], removed=[], cleared=False))


class Blind(WithoutEvents):
    """And nothing is known of it otherwise."""

    def add_workers(self, workers: dict[str, tuple[Card, Any]]) -> None:
        super().add_workers(workers)
        for name in workers:
            self.placement.approximate.remove_worker(name)
            self.placement.approximate.add_worker(name, 0)


ROUTERS = {"cache events": SimulatedRouter, "approximate index": WithoutEvents, "neither": Blind}


def main() -> None:
    """Print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--load", choices=list(GENERATORS), default="chat")
    parser.add_argument("--users", type=int, default=200)
    parser.add_argument("--duration-s", type=float, default=150.0)
    parser.add_argument("--cache-tokens", type=int, default=60_000)
    given = parser.parse_args()
    scenario = run.Scenario(
        load=run.WorkloadSettings(generator=given.load, users=given.users, duration_s=given.duration_s),
        graph=run.SimulatedGraph(cache_tokens=given.cache_tokens),
        router=RouterSettings(),
        slo=Slo(ttft_ms=2000.0, itl_ms=25.0),
        scale=1.0,
        seed=1,
    )
    print(f"{'':20} {'cached':>8} {'ttft p50':>10} {'ttft p99':>10} {'requests/s':>12}")
    for name, router in ROUTERS.items():
        run.SimulatedRouter = router  # type: ignore[misc]
        report = scenario.run()
        ttft = report.ttft_ms
        print(
            f"{name:20} {report.cached_share:8.1%} {ttft.p50:8.0f} ms {ttft.p99:8.0f} ms "
            f"{report.requests_per_s:12.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
