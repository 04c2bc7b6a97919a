from __future__ import annotations

from penstock.shapes import AttemptReport, FinishReason, Load, Output
from penstock.worker.metrics import WorkerMetrics


def test_metrics_tell_the_load_and_what_ended_attempts_took() -> None:
    metrics = WorkerMetrics()
    metrics.load_from(lambda: Load(running=3, steps=7, total_blocks=100))
    report = AttemptReport("a", 10.0, 10.5, None, 11.0, 13.0, output_tokens=4)
    metrics.ended(Output("a", finish_reason=FinishReason.STOP), report)
    metrics.ended(Output("b", finish_reason=FinishReason.REJECTED), None)
    lines = metrics.render().decode().splitlines()
    for line in (
        "penstock_engine_running 3.0",
        "penstock_engine_total_blocks 100.0",
        "penstock_engine_steps_total 7.0",
        'penstock_engine_attempts_total{outcome="stop"} 1.0',
        'penstock_engine_attempts_total{outcome="rejected"} 1.0',
        "penstock_engine_output_tokens_total 4.0",
        'penstock_engine_phase_seconds_sum{phase="queue"} 0.5',
        'penstock_engine_phase_seconds_sum{phase="decode"} 2.0',
    ):
        assert line in lines
    assert any(line.startswith("penstock_build_info{") for line in lines)
