"""`vllm serve`, and Penstock's graphs with the same engine settings, each as a user starts it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from checks.vllm.conftest import GRAPH, cpu_environment
from checks.vllm.engine.running import ENGINE_ARGS
from tests.ports import free_port

LIMITS = ("--block-size", "32", "--kv-cache-memory-bytes", str(128 << 20))
START_S = 300.0  # also on a machine that is busy with something else
STOP_S = 120.0


@contextlib.contextmanager
def vllm_serve(model: Path, name: str, log: Path, *flags: str) -> Iterator[tuple[str, int]]:
    """vLLM's own server: its URL and process id."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | cpu_environment() | {"VLLM_TARGET_DEVICE": "cpu", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, *ENGINE_ARGS, *LIMITS, *flags],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    try:
        _wait(url, server, log)
        yield url, server.pid
    finally:
        server.terminate()
        server.wait(timeout=STOP_S)


def _wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-4000:]
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=10):
            return
        time.sleep(0.2)
    raise AssertionError(f"vllm serve is not up after {START_S} s: {log.read_text()[-4000:]}")


def graph_of(
    model: Path, name: str, roles: Sequence[str], *flags: str, disagg: str = "always"
) -> dict[str, Any]:
    """deploy/vllm-cpu.yaml with one worker of each of these roles, on another model."""
    graph = yaml.safe_load(GRAPH.read_text())
    frontend = graph["spec"]["services"]["Frontend"]
    frontend["extraPodSpec"]["mainContainer"]["args"] = ["--disagg", disagg]
    workers = {role: _worker(model, name, role, flags) for role in roles}
    graph["spec"]["services"] = {"Frontend": frontend, **workers}
    return graph


def _worker(model: Path, name: str, role: str, flags: Sequence[str]) -> dict[str, Any]:
    own = ["--role", role, "--engine", "vllm", "--model", str(model), "--served-model-name", name]
    main = {"command": ["penstock", "worker"], "args": [*own, "--", *ENGINE_ARGS, *LIMITS, *flags]}
    return {"componentType": "worker", "replicas": 1, "extraPodSpec": {"mainContainer": main}}
