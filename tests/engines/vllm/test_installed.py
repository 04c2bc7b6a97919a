"""What vLLM is told by environment variables."""

from __future__ import annotations

import os

import pytest

from penstock.engines.vllm.installed import prepare_environment

GENERAL, OF_TRACES = "OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "http/protobuf"),
        ({GENERAL: "grpc"}, "grpc"),
        ({GENERAL: "grpc", OF_TRACES: "http/protobuf"}, "http/protobuf"),
    ],
)
def test_vllm_sends_spans_by_the_protocol_that_other_processes_use(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: str
) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    prepare_environment()
    assert os.environ[OF_TRACES] == expected
