"""vLLM on the CPU, as deploy/vllm-cpu.yaml sets it up: for engines of this process, and `vllm serve`."""

from __future__ import annotations

import os
from pathlib import Path

import yaml

GRAPH = Path(__file__).parents[2] / "deploy" / "vllm-cpu.yaml"


def cpu_environment() -> dict[str, str]:
    """The variables that the shipped graph gives its workers, and the launcher's."""
    envs = yaml.safe_load(GRAPH.read_text())["spec"]["envs"]
    return {"OMP_NUM_THREADS": "1"} | {env["name"]: env["value"] for env in envs}


def pytest_configure() -> None:
    for name, value in cpu_environment().items():
        os.environ.setdefault(name, value)
