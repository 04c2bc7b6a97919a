"""Reports of simulations that were not run."""

from __future__ import annotations

import msgspec

from penstock.bench.measurements import Histogram, Percentiles, Slo
from penstock.simulate.report import Results, SimulationReport


def report(good_share: float, **others: object) -> SimulationReport:
    """Of a run of 1,000 requests, of which this share was good."""
    empty = Results(Slo()).report(
        policy="kv", scale=1.0, seed=0, virtual_s=100.0, cpu_s=1.0, computing_share=0.5
    )
    times = Histogram()
    times.add(0.1)
    given = {
        "requests": 1000,
        "good_share": good_share,
        "ttft_met_share": 1.0,
        "itl_met_share": 1.0,
        "ttft_ms": Percentiles.of(times),
        **others,
    }
    return msgspec.structs.replace(empty, **given)
