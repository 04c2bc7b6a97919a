"""The Prometheus metrics of a worker: what its engine does. What clients see is in those of frontends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from penstock.core.attempt_phases import phases
from penstock.metrics import DURATION_BUCKETS_S, process_registry
from penstock.shapes import AttemptReport, Load, Output

GAUGES = {
    "running": "Attempts that hold KV blocks",
    "waiting": "Attempts that hold none yet",
    "prefill_tokens": "Prompt tokens still to compute",
    "used_blocks": "KV blocks of attempts and handoffs",
    "total_blocks": "KV blocks that there are",
    "held_handoffs": "Prompts whose KV nobody has pulled yet",
}
"""Fields of Load."""

PHASE_BUCKETS_S = (0.001, 0.005, 0.02, *DURATION_BUCKETS_S)


class WorkerMetrics:
    """What a worker counts, and the load of its engine."""

    def __init__(self) -> None:
        self._registry = process_registry()
        self._attempts = Counter(
            "penstock_engine_attempts", "Attempts ended", ["outcome"], registry=self._registry
        )
        self._output_tokens = Counter(
            "penstock_engine_output_tokens", "Tokens of ended attempts", registry=self._registry
        )
        self._phases = Histogram(
            "penstock_engine_phase_seconds",
            "Time of ended attempts in queue, transfer, prefill and decode",
            ["phase"],
            buckets=PHASE_BUCKETS_S,
            registry=self._registry,
        )

    def load_from(self, load: Callable[[], Load]) -> None:
        """Ask there at each scrape."""
        self._registry.register(_LoadCollector(load))

    def ended(self, output: Output, report: AttemptReport | None) -> None:
        """An attempt has ended. `report`: None where the engine never began with it."""
        self._attempts.labels(output.finish_reason).inc()
        if report is not None:
            self._output_tokens.inc(report.output_tokens)
            for phase in phases(report):
                self._phases.labels(phase.name).observe(phase.seconds)

    def render(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)


class _LoadCollector(Collector):
    def __init__(self, load: Callable[[], Load]) -> None:
        self._load = load

    def describe(self) -> Iterable[Metric]:
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        load = self._load()
        for name, documentation in GAUGES.items():
            yield GaugeMetricFamily(f"penstock_engine_{name}", documentation, value=getattr(load, name))
        yield CounterMetricFamily("penstock_engine_steps", "Turns that the engine took", value=load.steps)
