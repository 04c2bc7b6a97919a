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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.ports import free_port
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
MODEL = "tiny"
START_S = 90.0  # a busy machine starts five Python processes
ANSWER_S = 60.0  # for one request, however busy the machine is
STOP_S = 90.0  # for processes that were told to end, and drain first


class Frontend:
    """An HTTP address, and how it is talked to."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._clients: list[openai.OpenAI] = []

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=ANSWER_S) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def client(self, **options: Any) -> openai.OpenAI:
        """One of its own for each caller, with connections that end with this."""
        fixed: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": 2 * ANSWER_S}
        self._clients.append(openai.OpenAI(base_url=f"{self.url}/v1", **fixed, **options))
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

    def instances(self) -> list[dict] | None:
        """The workers that a frontend knows; None while it does not answer."""
        return self.health()[1].get("instances")

    def ready_workers(self) -> int:
        return sum(instance["state"] == "ready" for instance in self.instances() or ())

    def stop(self) -> None:
        """As systemd or Kubernetes would."""
        self.close()
        self.process.send_signal(signal.SIGTERM)


class Deployment(Frontend):
    """A frontend and workers, each of them a process. The frontend gets these options."""

    def __init__(self, folder: Path, *options: str) -> None:
        super().__init__()
        self.folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.start("frontend", "frontend", "--http-port", str(self.port), *options)

    def start(self, name: str, *arguments: str, module: str = "penstock") -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=ROOT,
                env={
                    **os.environ,
                    "PENSTOCK_LOG": "info",
                    "PENSTOCK_DISCOVERY": f"file:{self.folder / 'discovery'}",
                },
                stdout=log,
                stderr=log,
            )

    def worker(self, name: str, role: str, model: Path, *options: str) -> None:
        """`model` is a folder; the name that it is served under is always the same."""
        own = ("--model", str(model), "--served-model-name", MODEL, "--instance-id", name)
        self.start(name, "worker", "--role", role, *own, *options)

    def signal(self, name: str, number: signal.Signals) -> None:
        self._processes[name].send_signal(number)

    def end(self, name: str, how: signal.Signals) -> None:
        process = self._processes.pop(name)
        process.send_signal(how)
        process.wait(STOP_S)

    def states(self) -> dict[str, str]:
        instances = json.loads(self.get("/health")[1])["instances"]
        return {found["instance_id"]: found["state"] for found in instances}

    def wait_for(self, within_s: float = START_S, **states: str) -> None:
        seen: dict[str, str] = {}

        def holds() -> bool:
            nonlocal seen
            with contextlib.suppress(OSError):
                seen = self.states()
            return seen == states

        def instead() -> str:
            logs = "".join(path.read_text(errors="replace")[-3000:] for path in self.folder.glob("*.log"))
            return f"{seen} instead of {states}:\n{logs}"

        wait_until(holds, instead, within_s, look_s=0.1)

    def close(self) -> None:
        super().close()
        for name in list(self._processes):
            self.end(name, signal.SIGTERM)


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

    def command(self, *arguments: str, timeout_s: float = 2 * ANSWER_S) -> subprocess.CompletedProcess[str]:
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

    def wait_for_log(self, service: str, holds: Callable[[str], object]) -> str:
        """The lines of a service, once there is in them what is looked for: the launcher, another process,
        writes them when it has read them, which may be after the answer that they are about."""
        lines = ""

        def there() -> object:
            nonlocal lines
            lines = self.command("logs", service).stdout
            return holds(lines)

        wait_until(there, lambda: lines[-4000:], START_S, look_s=0.2)
        return lines

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
            return self.process.wait(timeout=STOP_S)
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


@contextlib.contextmanager
def another_frontend(graph: Path, logs: Path, disagg: str) -> Iterator[Process]:
    """A further frontend of the running graph of this state folder. `disagg`: whether prefill workers go
    first. The graph's own finds out what is faster, which on a busy machine may be either."""
    variables = {
        "PENSTOCK_NAMESPACE": graph.name,
        "PENSTOCK_LINK_SECRET": (graph / "secret").read_text().strip(),
        "PENSTOCK_LOG": "debug",
    }
    options = ("--disagg", disagg, "--expect", "prefill,decode")
    frontend = Process(logs, f"file:{graph / 'discovery'}", disagg, "frontend", *options, **variables)

    def healthy() -> bool:
        assert frontend.process.poll() is None, frontend.log.read_text()[-4000:]
        return frontend.health()[0] == 200

    try:
        wait_until(healthy, lambda: frontend.log.read_text()[-4000:], START_S, look_s=0.1)
        yield frontend
    finally:
        frontend.stop()
        code = frontend.process.wait(timeout=STOP_S)
    assert code == 0, frontend.log.read_text()[-4000:]


@contextlib.contextmanager
def deployed(folder: Path, *options: str) -> Iterator[Deployment]:
    """A frontend with these options, and what else is started there."""
    deployment = Deployment(folder, *options)
    try:
        yield deployment
    finally:
        deployment.close()


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    """A frontend, and no workers yet."""
    with deployed(tmp_path) as deployment:
        yield deployment


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
