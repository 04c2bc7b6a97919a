"""Traces by OpenTelemetry: spans leave this process over OTLP, as the standard variables OTEL_* say.

The SDK keeps what waits for the collector in a queue of limited length (OTEL_BSP_MAX_QUEUE_SIZE, 2,048
spans), which a thread of its own empties. So a collector that is slow or dead costs spans and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span as OtelSpan
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from penstock import __version__
from penstock.core.spans import Span
from penstock.detached import detached
from penstock.errors import ConfigError
from penstock.shapes import TraceContext

log = logging.getLogger("penstock.tracing")

CLOSE_S = 2.0
"""How long a process that ends waits for the collector to take its last spans."""

PROTOCOL_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
GRPC_PACKAGE = "opentelemetry-exporter-otlp-proto-grpc"

_propagator = TraceContextTextMapPropagator()


class RequestTrace:
    """The span of a request that has begun: others may refer to it."""

    def __init__(self, tracing: OtelTracing, span: OtelSpan, offset_ns: int) -> None:
        carrier: dict[str, str] = {}
        _propagator.inject(carrier, set_span_in_context(span))
        self.context = TraceContext(carrier["traceparent"], carrier.get("tracestate", ""))
        self.recording = span.is_recording()
        self._tracing = tracing
        self._span = span
        self._offset_ns = offset_ns

    def end(self, span: Span) -> None:
        """It has ended, as this says."""
        self._tracing.finish(self._span, span, self._offset_ns)


class OtelTracing:
    """Implements Tracing (ports.py). Spans have the resource of the variables OTEL_SERVICE_NAME and
    OTEL_RESOURCE_ATTRIBUTES, else these names."""

    def __init__(self, service: str, instance: str, exporter: SpanExporter, endpoint: str) -> None:
        names = {"service.name": service, "service.instance.id": instance, "service.version": __version__}
        resource = Resource(names).merge(Resource.create())
        if str(resource.attributes["service.name"]).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": service}))
        # The interpreter's end would otherwise wait for a dead collector.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(_Exporter(exporter, endpoint)))
        self._tracer = self._provider.get_tracer("penstock", __version__)

    def begin(self, name: str, given: TraceContext | None, began_at: float) -> RequestTrace:
        offset_ns = _unix_offset_ns()
        began_ns = offset_ns + _ns(began_at)
        span = self._tracer.start_span(name, _parent(given), SpanKind.SERVER, start_time=began_ns)
        return RequestTrace(self, span, offset_ns)

    def record(self, span: Span, parent: TraceContext) -> None:
        self._add(span, _parent(parent), SpanKind.SERVER, _unix_offset_ns())

    async def close(self) -> None:
        await asyncio.wait([detached(self._provider.shutdown)], timeout=CLOSE_S)

    def finish(self, begun: OtelSpan, span: Span, offset_ns: int) -> None:
        """Complete a span that was started, with those below it."""
        if begun.is_recording():
            begun.set_attributes(span.attributes)
            if span.error:
                begun.set_status(Status(StatusCode.ERROR, span.error))
            for name, at in span.events:
                begun.add_event(name, timestamp=offset_ns + _ns(at))
            within = set_span_in_context(begun)
            for child in span.children:
                self._add(child, within, SpanKind.INTERNAL, offset_ns)
        begun.end(offset_ns + _ns(span.ended_at))

    def _add(self, span: Span, within: Context | None, kind: SpanKind, offset_ns: int) -> None:
        begun = self._tracer.start_span(span.name, within, kind, start_time=offset_ns + _ns(span.began_at))
        self.finish(begun, span, offset_ns)


class _Exporter(SpanExporter):
    """Says once in the log that the collector does not take spans, and once that it does again."""

    def __init__(self, exporter: SpanExporter, endpoint: str) -> None:
        self._exporter = exporter
        self._endpoint = endpoint
        self._failed = False
        self._words = _LastWords()
        library = logging.getLogger("opentelemetry")
        library.addHandler(self._words)
        library.propagate = False  # it repeats itself with every batch

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        failed = result is not SpanExportResult.SUCCESS
        if failed and not self._failed:
            log.warning("%s takes no spans, which are dropped: %s", self._endpoint, self._words)
        elif self._failed and not failed:
            log.info("%s takes spans again", self._endpoint)
        self._failed = failed
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


class _LastWords(logging.Handler):
    """Keeps the latest message of a logger."""

    text = "no reason was given"

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()

    def __str__(self) -> str:
        return self.text


def otlp_exporter(environ: Mapping[str, str]) -> SpanExporter:
    """By OTLP over HTTP, or over gRPC where the variables say so and its package is installed. Raises
    ConfigError."""
    protocol = next(filter(None, map(environ.get, PROTOCOL_VARIABLES)), "http/protobuf")
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter()
    if protocol != "grpc":
        raise ConfigError(f"{PROTOCOL_VARIABLES[1]}: {protocol!r} is none of http/protobuf, grpc")
    if find_spec("opentelemetry.exporter.otlp.proto.grpc") is None:
        raise ConfigError(f"{PROTOCOL_VARIABLES[1]}: grpc needs `pip install {GRPC_PACKAGE}`")
    grpc: Any = import_module("opentelemetry.exporter.otlp.proto.grpc.trace_exporter")
    exporter: SpanExporter = grpc.OTLPSpanExporter()
    return exporter


def otel_tracing(service: str, instance: str, endpoint: str, environ: Mapping[str, str]) -> OtelTracing:
    """As the variables say; `endpoint` is for the log. Raises ConfigError."""
    return OtelTracing(service, instance, otlp_exporter(environ), endpoint)


def _parent(given: TraceContext | None) -> Context | None:
    if given is None:
        return None
    carrier = {"traceparent": given.traceparent}
    if given.tracestate:
        carrier["tracestate"] = given.tracestate
    return _propagator.extract(carrier, Context())


def _unix_offset_ns() -> int:
    """What is to be added to the monotonic clock's time for nanoseconds since 1970."""
    # The largest: this thread may be stopped between the two, which makes one too small.
    return max(time.time_ns() - time.monotonic_ns() for _ in range(3))


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
