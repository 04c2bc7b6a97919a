"""The operator's metrics for Prometheus."""

from __future__ import annotations

from collections import Counter as Count
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from penstock.metrics import process_registry

RECONCILE_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
STATES = ("pending", "successful", "failed")


class OperatorMetrics:
    """The metrics of one operator, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = process_registry()
        self._reconciled = Counter(
            "penstock_operator_reconciles",
            "Times that a graph was looked at, by outcome: done, failed (tried again), defect.",
            ["outcome"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "penstock_operator_reconcile_seconds",
            "How long one look took.",
            buckets=RECONCILE_BUCKETS_S,
            registry=self.registry,
        )
        self._queue = Gauge(
            "penstock_operator_queue", "Graphs that wait to be looked at.", registry=self.registry
        )
        self._leads = Gauge(
            "penstock_operator_leads",
            "1 where this operator holds the lease and acts, 0 where it stands by.",
            registry=self.registry,
        )
        for outcome in ("done", "failed", "defect"):
            self._reconciled.labels(outcome)
        self._graphs: Callable[[], Iterable[str]] = tuple
        self.registry.register(_Graphs(lambda: self._graphs()))

    def queue_from(self, source: Callable[[], int]) -> None:
        self._queue.set_function(source)

    def leads_from(self, source: Callable[[], bool]) -> None:
        self._leads.set_function(lambda: float(source()))

    def graphs_from(self, source: Callable[[], Iterable[str]]) -> None:
        """Set the source of the graphs' states."""
        self._graphs = source

    def reconciled(self, outcome: str, seconds: float) -> None:
        self._reconciled.labels(outcome).inc()
        self._seconds.observe(seconds)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _Graphs(Collector):
    """The number of graphs in each state, counted at each scrape."""

    def __init__(self, source: Callable[[], Iterable[str]]) -> None:
        self._source = source

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily("penstock_operator_graphs", "Graphs by state.", labels=["state"])
        counts = Count(self._source())
        for state in STATES:
            family.add_metric([state], counts[state])
        yield family
