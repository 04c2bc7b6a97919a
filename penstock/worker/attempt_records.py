"""What a worker says of each attempt, in the log, in metrics and in traces."""

from __future__ import annotations

import logging

from penstock.core.attempt_phases import phases
from penstock.core.spans import attempt_span
from penstock.ports import Tracing
from penstock.shapes import Attempt, AttemptReport, Output, TraceContext
from penstock.worker.metrics import WorkerMetrics

log = logging.getLogger("penstock.worker")


class AttemptRecords:
    """Told of each attempt that comes and ends. The lines are for `debug`: the frontend has a line for each
    request at `info`, under the id with which an attempt's id begins."""

    def __init__(self, instance_id: str, metrics: WorkerMetrics | None, tracing: Tracing | None) -> None:
        self._instance_id = instance_id
        self._metrics = metrics
        self._tracing = tracing
        self._traces: dict[str, TraceContext] = {}  # by attempt id, until it ends

    def received(self, attempt: Attempt, frontend_id: str) -> None:
        if self._tracing is not None and attempt.trace is not None:
            self._traces[attempt.attempt_id] = attempt.trace
        log.debug(
            "attempt received: attempt=%s frontend=%s prompt=%d output=%d prefill_only=%s handoff=%s",
            attempt.attempt_id,
            frontend_id,
            attempt.prompt_len,
            len(attempt.token_ids) - attempt.prompt_len,
            attempt.prefill_only,
            attempt.handoff.handoff_id if attempt.handoff is not None else "none",
        )

    def bounced(self, attempt: Attempt, reason: str) -> None:
        """It was not admitted, and is not `ended`."""
        log.debug("attempt bounced: attempt=%s reason=%r", attempt.attempt_id, reason)

    def ended(self, output: Output, report: AttemptReport | None) -> None:
        """With its last output. `report`: None where the engine never began with it."""
        if log.isEnabledFor(logging.DEBUG):
            log.debug("attempt ended: %s", _described(output, report))
        if self._metrics is not None:
            self._metrics.ended(output, report)
        parent = self._traces.pop(output.attempt_id, None) if self._tracing is not None else None
        if self._tracing is not None and parent is not None and report is not None:
            self._tracing.record(attempt_span(self._instance_id, output, report), parent)


def _described(output: Output, report: AttemptReport | None) -> str:
    words = [f"attempt={output.attempt_id} finish={output.finish_reason}"]
    if report is not None:
        words.append(f"output={report.output_tokens}")
        words += [f"{phase.name}_ms={phase.seconds * 1e3:.1f}" for phase in phases(report)]
    if output.error is not None:
        words.append(f"error={output.error!r}")
    return " ".join(words)
