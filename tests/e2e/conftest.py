"""The real thing: `penstock up` in its own process, with its workers and its frontend."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.ports import free_port

ROOT = Path(__file__).parents[2]
MODEL = "tiny"
START_S = 90.0  # a busy machine starts five Python processes


class Frontend:
    """An HTTP address, and how it is talked to."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._clients: list[openai.OpenAI] = []

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def client(self, **options: Any) -> openai.OpenAI:
        """One of its own for each caller, with connections that end with this."""
        self._clients.append(
            openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60, **options)
        )
        return self._clients[-1]

    def close(self) -> None:
        for client in self._clients:
            client.close()

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry these labels."""
        total = 0.0
        for line in self.get("/metrics")[1].splitlines():
            match = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
            if match and match[1] == name:
                found = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
                if labels.items() <= found.items():
                    total += float(match[3])
        return total


class Process(Frontend):
    """One Penstock process. `port` serves its HTTP: the API of a frontend, the probes of a worker."""

    def __init__(self, folder: Path, discovery: str, name: str, *arguments: str, **env: str) -> None:
        super().__init__()
        self.name = name
        self.log = folder / f"{name}.log"
        port = "--http-port" if arguments[0] == "frontend" else "--system-port"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*self.program(), *arguments, port, str(self.port)],
                env={
                    **os.environ,
                    "PENSTOCK_DISCOVERY": discovery,
                    "PENSTOCK_LINK_SECRET": "sixteen characters",
                    **env,
                },
                stdout=log,
                stderr=log,
                cwd=ROOT,
            )

    def program(self) -> list[str]:
        return [sys.executable, "-m", "penstock"]

    def health(self) -> tuple[int, dict]:
        """The status and body of /health; (0, {}) while nobody answers."""
        with contextlib.suppress(OSError):
            status, body = self.get("/health")
            return status, json.loads(body)
        return 0, {}

    def ready_workers(self) -> int:
        return sum(instance["state"] == "ready" for instance in self.health()[1].get("instances", ()))

    def stop(self) -> None:
        """As systemd or Kubernetes would."""
        self.close()
        self.process.send_signal(signal.SIGTERM)


class Graph(Frontend):
    """A running graph and its surroundings: state folder, logs, metrics."""

    def __init__(self, file: Path, state: Path, *options: str) -> None:
        super().__init__()
        self.state = state
        self.env = {
            "PENSTOCK_LOG": "debug",  # unless the environment has it
            **os.environ,
            "PENSTOCK_STATE_DIR": str(state),
            "PYTHONUNBUFFERED": "1",
        }
        self.console = state.parent / f"{state.name}-console.log"
        with self.console.open("w") as console:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "penstock", "up", str(file), "--port", str(self.port), *options],
                stdout=console,
                stderr=subprocess.STDOUT,
                env=self.env,
                cwd=ROOT,
            )

    # --- asking about it ----------------------------------------------------------------------------

    def command(self, *arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "penstock", *arguments],
            env=self.env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def status(self) -> dict[str, Any]:
        result = self.command("status", "--json")
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    def replicas(self, service: str = "") -> list[dict[str, Any]]:
        """The replicas of one service, or of all."""
        return [
            replica
            for found in self.status()["services"]
            if service in ("", found["name"])
            for replica in found["replicas"]
        ]

    # --- its life -----------------------------------------------------------------------------------

    def wait_healthy(self, instances: int | None = None, timeout_s: float = START_S) -> None:
        deadline = time.monotonic() + timeout_s
        seen = ""
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"penstock up ended:\n{self.console_text()[-4000:]}"
            with contextlib.suppress(OSError):
                status, seen = self.get("/health")
                if status == 200 and instances in (None, self.ready_instances(seen)):
                    return
            time.sleep(0.1)
        raise AssertionError(f"not healthy in {timeout_s} s: {seen}\n{self.console_text()[-4000:]}")

    @staticmethod
    def ready_instances(health: str) -> int:
        return sum(instance["state"] == "ready" for instance in json.loads(health)["instances"])

    def console_text(self) -> str:
        return self.console.read_text(errors="replace")

    def stop(self) -> int:
        self.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@contextlib.contextmanager
def running(
    file: Path, state: Path, *options: str, instances: int | None = None, start_s: float = START_S
) -> Iterator[Graph]:
    graph = Graph(file, state, *options)
    try:
        graph.wait_healthy(instances, start_s)
        yield graph
    finally:
        code = graph.stop()
    assert code == 0, graph.console_text()[-4000:]


@pytest.fixture(scope="session")
def local_graph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graph]:
    """deploy/local.yaml as shipped: 1 frontend, 2 prefill and 2 decode workers."""
    state = tmp_path_factory.mktemp("local") / "state"
    with running(ROOT / "deploy" / "local.yaml", state, instances=4) as graph:
        yield graph


@pytest.fixture(scope="session")
def aggregated_graph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graph]:
    """One aggregated worker: what disaggregated answers are held against."""
    folder = tmp_path_factory.mktemp("aggregated")
    file = folder / "aggregated.yaml"
    file.write_text(
        f"""
apiVersion: nvidia.com/v1alpha1
kind: DynamoGraphDeployment
metadata:
  name: aggregated
spec:
  services:
    Frontend:
      componentType: frontend
      extraPodSpec:
        mainContainer:
          command: [penstock, frontend, --router-mode, kv]
    Worker:
      componentType: worker
      extraPodSpec:
        mainContainer:
          command: [penstock, worker, --role, aggregated, --engine, reference, --model, {ROOT}/models/tiny]
"""
    )
    with running(file, folder / "state", instances=1) as graph:
        yield graph
