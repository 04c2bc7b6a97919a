"""Prometheus metrics of a process.

They live in a registry of their own, and nothing on the path of a token costs more than a bisect: what
changes with every engine step (latencies between tokens, a worker's load) is kept in plain Python and
turned into samples only when somebody scrapes.
"""

from __future__ import annotations

import asyncio
import platform
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import accumulate

import msgspec
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from penstock import __version__
from penstock.shapes import Load

METRICS_CONTENT_TYPE = CONTENT_TYPE_LATEST

TTFT_BUCKETS_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 20, 30, 60, 120)
ITL_BUCKETS_S = (
    0.001,
    0.002,
    0.005,
    0.01,
    0.015,
    0.02,
    0.025,
    0.03,
    0.04,
    0.05,
    0.075,
    0.1,
    0.2,
    0.5,
    1,
    5,
)
QUEUE_BUCKETS_S = (0.001, 0.01, 0.05, 0.1, 0.2, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30)
DURATION_BUCKETS_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800)


# Else a fifth of what is scraped are the times at which series began, which Prometheus knows by itself.
disable_created_metrics()  # type: ignore[no-untyped-call]


def process_registry() -> CollectorRegistry:
    """A registry with what every process tells of itself: its version, CPU time, memory and files."""
    registry = CollectorRegistry()
    build = Info("penstock_build", "Version of Penstock, always 1", registry=registry)
    build.info({"version": __version__, "python": platform.python_version()})
    ProcessCollector(registry=registry)
    return registry


class StepSeries:
    """A histogram's counts for one model. An observation costs a bisect and two additions."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # per bucket, and one for what is above all of them
        self.total = 0.0

    def observe(self, seconds: float, count: int) -> None:
        """Count `count` observations of `seconds` each."""
        self.counts[bisect_left(self._bounds, seconds)] += count
        self.total += seconds * count


class StepHistogram(Collector):
    """A histogram per model for what is observed with every step."""

    def __init__(
        self, name: str, documentation: str, buckets_s: Sequence[float], registry: CollectorRegistry
    ) -> None:
        self._name = name
        self._documentation = documentation
        self._bounds = [float(bound) for bound in buckets_s]
        self._series: dict[str, StepSeries] = {}
        registry.register(self)

    def series(self, model: str) -> StepSeries:
        return self._series.setdefault(model, StepSeries(self._bounds))

    def forget(self, model: str) -> None:
        self._series.pop(model, None)

    def describe(self) -> Iterator[HistogramMetricFamily]:
        yield HistogramMetricFamily(self._name, self._documentation, labels=["model"])

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._documentation, labels=["model"])
        for model, series in self._series.items():
            bounds = [*map(str, self._bounds), "+Inf"]
            family.add_metric(
                [model], list(zip(bounds, accumulate(series.counts), strict=True)), series.total
            )
        yield family


class ModelMetrics:
    """One model's series, looked up once instead of with every request."""

    def __init__(self, metrics: FrontendMetrics, model: str) -> None:
        self.time_to_first_token = metrics.time_to_first_token.labels(model)
        self.request_duration = metrics.request_duration.labels(model)
        self.queued = metrics.queued.labels(model)
        self.inflight = metrics.inflight.labels(model)
        self.prompt_tokens = metrics.prompt_tokens.labels(model)
        self.output_tokens = metrics.output_tokens.labels(model)
        self.cached_tokens = metrics.cached_tokens.labels(model)
        self.inter_token_latency = metrics.inter_token_latency.series(model)
        self.requests = cache(partial(metrics.requests.labels, model))  # by endpoint, status, outcome


class FrontendMetrics:
    """What the frontend counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, documentation: str, *labels: str) -> Counter:
            return Counter(f"penstock_{name}", documentation, ["model", *labels], registry=registry)

        def gauge(name: str, documentation: str) -> Gauge:
            return Gauge(f"penstock_{name}", documentation, ["model"], registry=registry)

        def histogram(name: str, documentation: str, buckets: Sequence[float]) -> Histogram:
            name = f"penstock_{name}"
            return Histogram(name, documentation, ["model"], buckets=buckets, registry=registry)

        self.requests = counter(
            "requests", "Requests by HTTP status (499: client left)", "endpoint", "status", "outcome"
        )
        self.time_to_first_token = histogram(
            "time_to_first_token_seconds", "From the request's last byte to the first token", TTFT_BUCKETS_S
        )
        self.request_duration = histogram(
            "request_duration_seconds",
            "From the request's last byte to the answer's last byte",
            DURATION_BUCKETS_S,
        )
        self.inter_token_latency = StepHistogram(
            "penstock_inter_token_latency_seconds",
            "Between tokens after the first; a step's k tokens count as k of a k-th of its time each",
            ITL_BUCKETS_S,
            registry,
        )
        self.queued = gauge("queued_requests", "Requests without a first token yet")
        self.inflight = gauge("inflight_requests", "Requests not answered yet")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that got tokens")
        self.output_tokens = counter("output_tokens", "Tokens generated")
        self.cached_tokens = counter("cached_tokens", "Prompt tokens found in a cache")
        self._models: dict[str, ModelMetrics] = {}

    def of(self, model: str) -> ModelMetrics:
        """The series of a model that is known to exist: series are kept until `forget`."""
        series = self._models.get(model)
        if series is None:
            series = self._models[model] = ModelMetrics(self, model)
        return series

    def forget(self, model: str) -> None:
        """Remove all series of a model that nobody serves any more. Unknown ones are ignored."""
        self._models.pop(model, None)
        self.inter_token_latency.forget(model)
        for metric in vars(self).values():
            if isinstance(metric, (Counter, Gauge, Histogram)):
                metric.remove_by_labels({"model": model})


class TokenizerMetrics:
    """How long prompts fare before they are requests."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, documentation: str) -> Gauge:
            return Gauge(f"penstock_tokenizer_{name}", documentation, registry=registry)

        self._queued = gauge("queued", "Calls whose long prompts wait for the tokenizer's thread")
        self._chars = gauge("queued_chars", "Characters that wait for it")
        self._wait = gauge("wait_seconds", "Predicted wait for it behind all that waits")
        self._rejections = Counter(
            "penstock_tokenizer_rejected",
            "Calls answered with 429 because of it (reasons as in penstock_rejected)",
            ["reason"],
            registry=registry,
        )
        self._seconds = Histogram(
            "penstock_tokenizer_queue_seconds",
            "Of a long prompt, in which the thread worked on others'",
            buckets=QUEUE_BUCKETS_S,
            registry=registry,
        )

    def queue_from(
        self, queued: Callable[[], float], chars: Callable[[], float], wait_ms: Callable[[], float]
    ) -> None:
        """Ask there at each scrape."""
        self._queued.set_function(queued)
        self._chars.set_function(chars)
        self._wait.set_function(lambda: wait_ms() / 1e3)

    def rejected(self, reason: str) -> None:
        """A call was refused. `reason` as in core/admission.py."""
        self._rejections.labels(reason).inc()

    def waited(self, seconds: float) -> None:
        """A call's prompts are tokenized."""
        self._seconds.observe(seconds)


class RouterMetrics:
    """What the router counts, and the latest word of each worker.

    A worker's series exist exactly as long as the router knows the instance.
    """

    def __init__(self, registry: CollectorRegistry, model_gone: Callable[[str], None]) -> None:
        """`model_gone` is called with each model that nobody serves any more."""
        self.model_gone = model_gone

        def counter(name: str, documentation: str, *labels: str) -> Counter:
            return Counter(f"penstock_{name}", documentation, labels, registry=registry)

        self._decisions = cache(counter("decisions", "Routing decisions", "policy", "path").labels)
        self._predicted = counter("predicted_cached_tokens", "Cached prompt tokens that the index foresaw")
        self._actual = counter("actual_cached_tokens", "Cached prompt tokens that engines reported")
        self._attempts = cache(counter("attempts", "Attempts ended", "role", "outcome").labels)
        self._bounces = counter("bounces", "Attempts a worker refused", "role")
        self._retries = counter("retries", "Further attempts after a failed one")
        self._transfers = counter("transfers", "Prompts whose KV was pulled")
        self._transferred = counter("transferred_blocks", "KV blocks pulled")
        self._rejections = counter(
            "rejected",
            "Requests answered with 429 (wait: predicted too long; full: too many wait)",
            "reason",
        )
        self._queue_seconds = Histogram(
            "penstock_queue_seconds",
            "From a request's coming until it is sent to a worker",
            buckets=QUEUE_BUCKETS_S,
            registry=registry,
        )
        self._workers = _WorkerGauges(registry)
        self._queues = _QueueGauges(registry)

    def rejected(self, reason: str) -> None:
        """A request was refused. `reason` as in core/admission.py."""
        self._rejections.labels(reason).inc()

    def waited(self, seconds: float) -> None:
        """A request goes to a worker."""
        self._queue_seconds.observe(seconds)

    def queues_from(self, source: Callable[[], Iterable[QueueView]]) -> None:
        """Ask there at each scrape."""
        self._queues.source = source

    def decided(self, policy: str, path: str) -> None:
        """A request was placed. `path` is local, remote or aggregated."""
        self._decisions(policy, path).inc()

    def overlap(self, predicted_tokens: int, cached_tokens: int) -> None:
        """An attempt's first output came: what the index had promised, and what was there."""
        self._predicted.inc(predicted_tokens)
        self._actual.inc(cached_tokens)

    def attempt_ended(self, role: str, outcome: str) -> None:
        """`outcome` is a FinishReason's value, or `lost`."""
        self._attempts(role, outcome).inc()

    def bounced(self, role: str) -> None:
        self._bounces.labels(role).inc()

    def retried(self) -> None:
        self._retries.inc()

    def transferred(self, blocks: int) -> None:
        """A decode worker pulled this many blocks for a prompt."""
        self._transfers.inc()
        self._transferred.inc(blocks)

    def state(self, instance_id: str, role: str, state: str) -> None:
        """An instance's state (core/membership.py)."""
        self._workers.states[instance_id] = (role, state)
        if state == "connecting":
            self._workers.loads.pop(instance_id, None)

    def load(self, instance_id: str, load: Load) -> None:
        """The latest load of a connected instance. Called for every step: one dictionary write."""
        self._workers.loads[instance_id] = load

    def unpaired(self, instance_ids: Collection[str]) -> None:
        """Those that have no partner to hand prompts to, or to take them from (core/pairing.py)."""
        self._workers.unpaired = instance_ids

    def distrusted_from(self, causes: Mapping[str, str]) -> None:
        """Look there at each scrape for those whose cache events are not believed, and why."""
        self._workers.distrusted = causes

    def instance_gone(self, instance_id: str) -> None:
        """Remove all series of an instance. Unknown ids are ignored."""
        self._workers.states.pop(instance_id, None)
        self._workers.loads.pop(instance_id, None)


class QueueView(msgspec.Struct, frozen=True):
    """What waits at a frontend for one model."""

    model: str
    requests: int
    saturation_ms: float


class _QueueGauges(Collector):
    """Gauges per model, asked for at each scrape."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.source: Callable[[], Iterable[QueueView]] = list
        registry.register(self)

    def describe(self) -> Iterator[GaugeMetricFamily]:
        return self.collect()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        queued = GaugeMetricFamily(
            "penstock_queued", "Requests that wait here for their turn at a worker", labels=["model"]
        )
        saturation = GaugeMetricFamily(
            "penstock_saturation_seconds",
            "Predicted wait for a worker behind all that waits",
            labels=["model"],
        )
        for view in self.source():
            queued.add_metric([view.model], view.requests)
            saturation.add_metric([view.model], view.saturation_ms / 1e3)
        yield queued
        yield saturation


class _WorkerGauges(Collector):
    """Gauges per instance, made from the latest loads at each scrape."""

    FIELDS = ("running", "waiting", "prefill_tokens", "used_blocks", "total_blocks")

    def __init__(self, registry: CollectorRegistry) -> None:
        self.states: dict[str, tuple[str, str]] = {}  # instance id -> role, state
        self.loads: dict[str, Load] = {}
        self.unpaired: Collection[str] = ()
        self.distrusted: Mapping[str, str] = {}  # instance id -> cause
        registry.register(self)

    def describe(self) -> Iterator[GaugeMetricFamily]:
        yield from self._families()
        yield self._state_family({})
        yield self._distrusted_family()

    @staticmethod
    def _state_family(states: Mapping[str, tuple[str, str]]) -> GaugeMetricFamily:
        family = GaugeMetricFamily(
            "penstock_instance_state", "1 for the state it is in", labels=["instance", "role", "state"]
        )
        for instance_id, (role, state) in states.items():
            family.add_metric([instance_id, role, state], 1.0)
        return family

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for family in self._families():
            field = family.name.removeprefix("penstock_worker_")
            for instance_id, (role, state) in self.states.items():
                load = self.loads.get(instance_id)
                if field == "connected":
                    family.add_metric([instance_id, role], float(state != "connecting"))
                elif field == "unpaired":
                    family.add_metric([instance_id, role], float(instance_id in self.unpaired))
                elif load is not None:
                    family.add_metric([instance_id, role], float(getattr(load, field)))
            yield family
        yield self._state_family(self.states)
        distrusted = self._distrusted_family()
        for instance_id, cause in self.distrusted.items():
            role, _ = self.states.get(instance_id, ("", ""))
            distrusted.add_metric([instance_id, role, cause], 1.0)
        yield distrusted

    @staticmethod
    def _distrusted_family() -> GaugeMetricFamily:
        return GaugeMetricFamily(
            "penstock_worker_distrusted",
            "1 while its cache events are not believed, and what was sent to it counts instead",
            labels=["instance", "role", "cause"],
        )

    def _families(self) -> Iterator[GaugeMetricFamily]:
        for field in (*self.FIELDS, "connected", "unpaired"):
            words = field.replace("_", " ")
            yield GaugeMetricFamily(
                f"penstock_worker_{field}", f"Worker's latest: {words}", labels=["instance", "role"]
            )


class Metrics:
    """All metrics of one frontend process."""

    def __init__(self) -> None:
        self._registry = process_registry()
        self.frontend = FrontendMetrics(self._registry)
        self.tokenizer = TokenizerMetrics(self._registry)
        self.router = RouterMetrics(self._registry, self.frontend.forget)
        tasks = Gauge("penstock_tasks", "asyncio tasks of this process", registry=self._registry)
        tasks.set_function(_tasks)

    def watch_discovery(self, trouble: Callable[[], str]) -> None:
        """Ask, at each scrape, whether discovery works."""
        gauge = Gauge(
            "penstock_discovery_up",
            "0: the set of instances may be out of date, for the reason in the log",
            registry=self._registry,
        )
        gauge.set_function(lambda: 0.0 if trouble() else 1.0)

    def count_store_failures(self) -> Counter:
        """The counter of a store of responses that is not in this process."""
        return Counter(
            "penstock_response_store_failures",
            "Commands that the store of responses did not carry out, for the reason in the log",
            registry=self._registry,
        )

    def render(self) -> bytes:
        """The exposition format, as METRICS_CONTENT_TYPE says."""
        return generate_latest(self._registry)


def _tasks() -> int:
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:  # no event loop runs here
        return 0
