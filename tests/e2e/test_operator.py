"""The operator's process, on an API server in memory: it starts, acts, hands over, and outlives outages."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from penstock.graph.crds import graph_crd, scaling_adapter_crd
from penstock.kubernetes.kinds import DEFINITIONS, DEPLOYMENTS, GRAPHS, LEASES
from tests.kubernetes_http import ApiServer
from tests.ports import free_port
from tests.waiting import wait_until

WITHIN_S = 90.0  # a busy machine takes long to start a process


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ApiServer]:
    with ApiServer(tmp_path) as server:
        yield server


@pytest.fixture
def with_crds(server: ApiServer) -> ApiServer:
    for crd in (graph_crd(), scaling_adapter_crd()):
        server.do(server.double.create(DEFINITIONS, crd))
    return server


class Operator:
    def __init__(self, server: ApiServer, log: Path) -> None:
        self.port = free_port()
        self.log = log
        options = {
            "--kubeconfig": str(server.kubeconfig),
            "--lease-namespace": "ops",
            "--system-port": str(self.port),
            "--image": "penstock:test",
        }
        words = [word for option in options.items() for word in option]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "penstock", "operator", *words], stdout=file, stderr=file
            )

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=WITHIN_S) as response:
            text: str = response.read().decode()
        return text

    def health(self) -> dict[str, Any]:
        """Empty while nobody listens."""
        try:
            told: dict[str, Any] = json.loads(self.get("/health"))
        except OSError:
            return {}
        return told

    def leads(self, leads: bool = True) -> bool:
        """Whether it says so."""
        return self.health().get("leads") is leads

    def counts(self, sample: str) -> bool:
        """Whether this line is among its metrics."""
        return sample in self.get("/metrics").splitlines()


@contextmanager
def running(server: ApiServer, log: Path) -> Iterator[Operator]:
    operator = Operator(server, log)
    try:
        yield operator
    finally:
        operator.process.kill()
        operator.process.wait()


def graph(name: str) -> dict[str, Any]:
    def service(*command: str) -> dict[str, Any]:
        container = {"image": "penstock:1", "command": ["penstock", *command]}
        return {"extraPodSpec": {"mainContainer": container}}

    services = {"Frontend": service("frontend"), "Worker": service("worker", "--model", "m")}
    return {
        "apiVersion": GRAPHS.api_version,
        "kind": GRAPHS.name,
        "metadata": {"name": name, "namespace": "ns"},
        "spec": {"services": services},
    }


def has_deployment(server: ApiServer, name: str) -> bool:
    return server.do(lambda: server.double.stored(DEPLOYMENTS, f"{name}-worker", "ns")) is not None


def test_it_acts_tells_of_itself_and_hands_over_at_once(with_crds: ApiServer, tmp_path: Path) -> None:
    server = with_crds
    with running(server, tmp_path / "first.log") as first:
        wait_until(first.leads, "the first one leads", WITHIN_S)
        server.do(server.double.create(GRAPHS, graph("one")))
        wait_until(lambda: has_deployment(server, "one"), "the graph has its Deployment", WITHIN_S)
        assert first.counts("penstock_operator_leads 1.0")
        # The graph's state is written once its Deployments are there.
        wait_until(lambda: first.counts('penstock_operator_graphs{state="pending"} 1.0'), "it is counted")
        with running(server, tmp_path / "second.log") as second:
            wait_until(lambda: second.health().get("status") == "healthy", "the second stands by", WITHIN_S)
            assert second.leads(False)
            first.process.send_signal(signal.SIGTERM)
            assert first.process.wait(timeout=WITHIN_S) == 0
            assert server.do(lambda: server.double.stored(LEASES, "penstock-operator", "ops"))["spec"]
            wait_until(second.leads, "the second one leads", WITHIN_S)
            server.do(server.double.create(GRAPHS, graph("two")))
            wait_until(lambda: has_deployment(server, "two"), "the second one acts", WITHIN_S)


def test_one_that_loses_its_lease_stands_by_and_acts_again(with_crds: ApiServer, tmp_path: Path) -> None:
    server = with_crds
    with running(server, tmp_path / "log") as operator:
        wait_until(operator.leads, "it leads", WITHIN_S)
        server.do(server.double.disconnect)
        wait_until(lambda: operator.leads(False), "it stops acting", WITHIN_S)
        server.do(server.double.connect)
        wait_until(operator.leads, "it leads again", WITHIN_S)
        server.do(server.double.create(GRAPHS, graph("one")))
        wait_until(lambda: has_deployment(server, "one"), "it acts again", WITHIN_S)
        assert operator.process.poll() is None
        assert "Traceback" not in operator.log.read_text()


def test_without_crds_it_says_how_to_install_them_and_ends(server: ApiServer, tmp_path: Path) -> None:
    with running(server, tmp_path / "log") as operator:
        assert operator.process.wait(timeout=WITHIN_S) == 2
        assert "kubectl apply --server-side -k deploy/crds" in operator.log.read_text()
