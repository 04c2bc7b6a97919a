"""vLLM's own metrics (`vllm:*`), kept by its own class from what its core says of each step.

vLLM's server also takes the time between any two tokens of each request, with every token. That is not done
here, where frontends measure it once a step: `vllm:inter_token_latency_seconds` stays empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from penstock.shapes import AttemptReport

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.metrics.stats import IterationStats


@dataclass(slots=True)
class CoreTimes:
    """When an attempt came, began and answered, by the monotonic clock, which the core's process shares."""

    submitted_at: float
    scheduled_at: float | None = None
    first_token_at: float | None = None
    pulled: bool = False

    def answered(self, core_output: EngineCoreOutput, now: float) -> None:
        """Its first output came."""
        self.first_token_at = now
        events = core_output.events or ()
        self.scheduled_at = next((it.timestamp for it in events if it.type.name == "SCHEDULED"), None)
        stats = core_output.prefill_stats
        self.pulled = stats is not None and stats.num_external_cached_tokens > 0

    def report(self, attempt_id: str, tokens: int, now: float) -> AttemptReport:
        """It has ended. vLLM schedules a request that pulls KV when that is there, and does not say when
        the pull began."""
        return AttemptReport(
            attempt_id=attempt_id,
            submitted_at=self.submitted_at,
            began_at=self.submitted_at if self.pulled else self.scheduled_at,
            pulled_at=self.scheduled_at if self.pulled else None,
            first_token_at=self.first_token_at,
            ended_at=now,
            output_tokens=tokens,
        )


class CoreMetrics:
    """Of one vLLM. Two at a time in one process would have the same names."""

    def __init__(self, config: VllmConfig, ranks: int) -> None:
        from vllm.v1.metrics.loggers import PrometheusStatLogger

        self._logger = PrometheusStatLogger(config, list(range(ranks)))
        self._logger.log_engine_initialized()
        self._registry = CollectorRegistry()
        self._registry.register(_OfVllm())

    def observe(self, step: EngineCoreOutputs, ended: Sequence[AttemptReport]) -> None:
        """A step of the core, and what it ended."""
        from vllm.v1.metrics.stats import IterationStats

        iteration = IterationStats()
        for output in step.outputs:
            iteration.num_generation_tokens += len(output.new_token_ids)
            if output.prefill_stats is not None:
                iteration.prompt_token_stats.update_from_output(output.prefill_stats)
        reports = {report.attempt_id: report for report in ended}
        for output in step.outputs if reports else ():
            report = reports.get(output.request_id.rstrip("+"))
            if report is not None and output.finish_reason is not None:
                _finish(iteration, output, report)
        self._logger.record(step.scheduler_stats, iteration, engine_idx=step.engine_index)

    def exposition(self) -> bytes:
        """As Engine.exposition."""
        return generate_latest(self._registry)


def _finish(iteration: IterationStats, output: EngineCoreOutput, report: AttemptReport) -> None:
    from vllm.v1.metrics.stats import FinishedRequestStats

    began_at, first_at = report.pulled_at or report.began_at, report.first_token_at
    if began_at is None or first_at is None:
        return
    decode_s, more = report.ended_at - first_at, report.output_tokens - 1
    iteration.time_to_first_tokens_iter.append(first_at - report.submitted_at)
    iteration.finished_requests.append(
        FinishedRequestStats(
            finish_reason=output.finish_reason,
            e2e_latency=report.ended_at - report.submitted_at,
            num_generation_tokens=report.output_tokens,
            queued_time=began_at - report.submitted_at,
            prefill_time=first_at - began_at,
            inference_time=report.ended_at - began_at,
            decode_time=decode_s,
            mean_time_per_output_token=decode_s / more if more > 0 else 0,
        )
    )


class _OfVllm(Collector):
    """The families of vLLM in the default registry, which has others."""

    def collect(self) -> Iterator[Metric]:
        return (family for family in REGISTRY.collect() if family.name.startswith("vllm:"))

    def describe(self) -> Iterator[Metric]:
        return iter(())
