"""A frontend and workers that find each other as pods do, without a cluster: the API server is a double."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock.kubernetes.kinds import PODS
from tests.discovery.pods import GRAPH, pod, running, tell
from tests.e2e.conftest import START_S, Process
from tests.kubernetes_http import ApiServer
from tests.ports import free_port
from tests.waiting import wait_until

NS = "test"
IP = "127.0.0.1"


class Shop:
    """A frontend, and two workers with their pods."""

    def __init__(self, folder: Path, server: ApiServer) -> None:
        self.folder, self.server = folder, server
        self.ports = {f"w-{number}": free_port() for number in range(2)}
        self.workers = {name: self.start_worker(name) for name in self.ports}
        environment = {"PENSTOCK_NAMESPACE": GRAPH, "KUBECONFIG": str(server.kubeconfig)}
        self.frontend = Process(folder, "kubernetes:", "frontend", "frontend", **environment)
        for name, port in self.ports.items():
            server.do(server.double.create(PODS, pod(NS, name, "aggregated", port)))
            self.tell(name)

    def start_worker(self, name: str) -> Process:
        """Without access to the API server, as in a pod without a token."""
        options = (
            "--engine",
            "sim",
            "--model",
            "sim",
            "--instance-id",
            name,
            "--port",
            str(self.ports[name]),
        )
        environment = {"PENSTOCK_NAMESPACE": GRAPH, "KUBECONFIG": "/dev/null"}
        return Process(self.folder, "kubernetes:", name, "worker", *options, **environment)

    def tell(self, name: str, **status: float) -> None:
        """Let its kubelet say that it runs."""
        self.server.do(tell(self.server.double, NS, name, running(IP, **status)))

    def wait(self, holds: Callable[[], bool], what: str) -> None:
        wait_until(holds, lambda: f"{what}\n{self.frontend.log.read_text()[-3000:]}", START_S, look_s=0.1)

    def wait_ready(self, count: int) -> None:
        self.wait(lambda: self.frontend.ready_workers() == count, f"{count} workers are ready")

    def ask(self) -> str | None:
        client = self.frontend.client()
        answer = client.completions.create(model="sim", prompt="a b c", max_tokens=20)
        return answer.choices[0].finish_reason

    def close(self) -> None:
        for process in (self.frontend, *self.workers.values()):
            process.close()
            process.process.kill()
            process.process.wait()


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    with ApiServer(tmp_path) as server:
        shop = Shop(tmp_path, server)
        try:
            yield shop
        finally:
            shop.close()


def test_pods_are_found_and_an_outage_of_the_api_server_takes_nothing_away(shop: Shop) -> None:
    frontend, double = shop.frontend, shop.server.double
    shop.wait_ready(2)
    assert shop.ask() == "length"
    assert {view["model"] for view in frontend.health()[1]["instances"]} == {"sim"}
    assert frontend.metric("penstock_discovery_up") == 1

    shop.server.do(double.disconnect)
    shop.wait(lambda: frontend.metric("penstock_discovery_up") == 0, "the outage is seen")
    assert frontend.ready_workers() == 2
    assert shop.ask() == "length"

    # A container of a known pod is started again meanwhile: it is connected without the API server.
    shop.workers["w-1"].process.kill()
    shop.wait_ready(1)
    restarted_at = time.time()
    shop.workers["w-1"].close()
    shop.workers["w-1"].process.wait()
    shop.workers["w-1"] = shop.start_worker("w-1")
    shop.wait_ready(2)
    assert shop.ask() == "length"

    # When the API server says so afterwards, what is connected stays connected.
    shop.server.do(lambda: double.remove(PODS, "w-0", NS))
    shop.server.do(double.connect)
    shop.tell("w-1", restarts=1, started=restarted_at)
    shop.wait(lambda: frontend.metric("penstock_discovery_up") == 1, "the end of the outage is seen")
    shop.workers["w-0"].stop()
    shop.wait(lambda: len(frontend.instances() or ()) == 1, "w-0 is forgotten")
    assert shop.ask() == "length"
    log = frontend.log.read_text()
    assert log.count("instance up: w-1") == 2

    # It leaves in order, and is started again in its place, before its pod says anything of that.
    shop.workers["w-1"].stop()
    shop.wait_ready(0)
    shop.workers["w-1"].process.wait()
    shop.workers["w-1"] = shop.start_worker("w-1")
    shop.wait_ready(1)
    assert shop.ask() == "length"
    assert "pods: the API server does not answer, the last known objects stay" in log
    assert "pods: the API server answers again" in log
