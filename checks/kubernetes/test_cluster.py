"""The cluster does what Kubernetes promises, as far as Penstock needs it."""

from __future__ import annotations

import json
import time
import urllib.request

import pytest

from checks.kubernetes import faults
from checks.kubernetes.cluster import lifecycle
from checks.kubernetes.graphs import Images
from checks.kubernetes.kubectl import Kubectl, eventually, is_ready
from checks.kubernetes.pods import PORT, SERVE, WAIT, deployment, named_pod, pod, service

# A node is given up 40 s after it was last heard of.
GIVEN_UP_S = 120.0
BACK_S = 120.0

RESOLVE = """
import json, socket, sys
print(json.dumps(sorted({found[4][0] for found in socket.getaddrinfo(sys.argv[1], 80)})))
"""


def ready(cluster: Kubectl, node: str) -> bool:
    return is_ready(cluster.get("node", node))


def addresses(kubectl: Kubectl, pod_name: str, host: str) -> list[str]:
    """What a pod's own resolver finds."""
    found: list[str] = json.loads(kubectl.exec(pod_name, "python3", "-c", RESOLVE, host))
    return found


def fetched(kubectl: Kubectl, pod_name: str, host: str) -> str:
    """The status of a page that this pod fetches."""
    url = f"http://{host}:{PORT}/"
    return kubectl.exec(pod_name, "curl", "-sS", "-m", "30", "-o", "/dev/null", "-w", "%{http_code}", url)


def test_nodes_are_ready(cluster: Kubectl, node_names: list[str]) -> None:
    assert len(node_names) >= 2
    for name in node_names:
        assert ready(cluster, name)


def test_pods_reach_pods_and_services_across_nodes(
    kubectl: Kubectl, images: Images, node_names: list[str]
) -> None:
    here, there = node_names[:2]
    kubectl.apply(
        named_pod("server", pod(images.penstock, SERVE, there)),
        named_pod("near", pod(images.penstock, WAIT, there)),
        named_pod("far", pod(images.penstock, WAIT, here)),
        service("server"),
        {**service("server", clusterIP="None"), "metadata": {"name": "headless"}},
    )
    kubectl.wait("--for=condition=Ready", "pod", "--all")
    server = kubectl.get("pod", "server")["status"]["podIP"]
    virtual = kubectl.get("service", "server")["spec"]["clusterIP"]
    eventually(lambda: fetched(kubectl, "far", "server") == "200", "the service", BACK_S, [AssertionError])
    for client in ("near", "far"):
        assert addresses(kubectl, client, "server") == [virtual]
        assert addresses(kubectl, client, f"server.{kubectl.namespace}.svc.cluster.local") == [virtual]
        assert addresses(kubectl, client, "headless") == [server]
        for host in (server, virtual, "server", "headless"):
            assert fetched(kubectl, client, host) == "200"
    unknown = kubectl.run("exec", "far", "--", "python3", "-c", RESOLVE, "nobody")
    assert unknown.returncode != 0
    assert "Name or service not known" in unknown.stderr


def test_exec_logs_copies_and_port_forward(kubectl: Kubectl, images: Images) -> None:
    kubectl.apply(named_pod("server", pod(images.penstock, SERVE)), service("server"))
    kubectl.wait("--for=condition=Ready", "pod/server")
    assert kubectl.exec("server", "id", "-u").strip() == "10001"
    kubectl.exec("server", "sh", "-c", "echo found > /tmp/page")
    for target in ("pod/server", "service/server"):
        with (
            kubectl.port_forward(target, PORT) as url,
            urllib.request.urlopen(f"{url}/page", timeout=60) as response,
        ):
            assert response.read() == b"found\n"
    eventually(lambda: '"GET /page' in kubectl("logs", "server"), "the request in the log", BACK_S)


@pytest.mark.own_cluster
def test_a_killed_container_is_started_again(kubectl: Kubectl, images: Images) -> None:
    kubectl.apply(named_pod("killed", pod(images.penstock, ["sh", "-c", "echo I live; sleep infinity"])))
    kubectl.wait("--for=condition=Ready", "pod/killed")
    faults.kill_container(kubectl, "killed")

    def restarted() -> bool:
        [status] = kubectl.get("pod", "killed")["status"]["containerStatuses"]
        return bool(status["restartCount"])

    eventually(restarted, "a restart", BACK_S)
    assert kubectl("logs", "--previous", "killed") == "I live\n"
    [status] = kubectl.get("pod", "killed")["status"]["containerStatuses"]
    assert status["lastState"]["terminated"]["exitCode"] == 137


@pytest.mark.own_cluster
def test_a_frozen_node_is_given_up_and_comes_back(
    cluster: Kubectl, kubectl: Kubectl, images: Images, node_names: list[str]
) -> None:
    healthy, node = node_names[:2]
    kubectl.apply(
        named_pod("server", pod(images.penstock, SERVE, node)),
        named_pod("client", pod(images.penstock, WAIT, healthy)),
    )
    kubectl.wait("--for=condition=Ready", "pod", "--all")
    address = kubectl.get("pod", "server")["status"]["podIP"]
    assert fetched(kubectl, "client", address) == "200"
    with faults.frozen(node):
        silent = kubectl.run("exec", "client", "--", "curl", "-sS", "-m", "2", f"http://{address}:{PORT}/")
        assert "timed out" in silent.stderr
        eventually(lambda: not ready(cluster, node), f"{node} is given up", GIVEN_UP_S)
        assert ready(cluster, healthy)
    eventually(lambda: ready(cluster, node), f"{node} is back", BACK_S)
    assert fetched(kubectl, "client", address) == "200"


@pytest.mark.own_cluster
def test_a_node_without_its_cable_is_unreachable(
    kubectl: Kubectl, images: Images, node_names: list[str]
) -> None:
    here, there = node_names[:2]
    kubectl.apply(
        named_pod("server", pod(images.penstock, SERVE, there)),
        named_pod("client", pod(images.penstock, WAIT, here)),
    )
    kubectl.wait("--for=condition=Ready", "pod", "--all")
    address = kubectl.get("pod", "server")["status"]["podIP"]
    with faults.cut_off(there):
        silent = kubectl.run("exec", "client", "--", "curl", "-sS", "-m", "2", f"http://{address}:{PORT}/")
        assert silent.returncode != 0
    eventually(lambda: fetched(kubectl, "client", address) == "200", "the server", BACK_S, [AssertionError])


@pytest.mark.own_cluster
def test_a_node_that_loses_power_starts_its_pods_again(
    kubectl: Kubectl, images: Images, node_names: list[str]
) -> None:
    node = node_names[1]
    kubectl.apply(named_pod("server", pod(images.penstock, SERVE, node)))
    kubectl.wait("--for=condition=Ready", "pod/server")
    with faults.powered_off(node):
        gone = kubectl.run("exec", "server", "--", "true")
        assert gone.returncode != 0

    def started_again() -> bool:
        # Nobody noticed that the node was away, so node and pod count as Ready all the time.
        [status] = kubectl.get("pod", "server")["status"]["containerStatuses"]
        return bool(status["ready"] and status["restartCount"])

    eventually(started_again, "the pod was started again", BACK_S)
    with (
        kubectl.port_forward("pod/server", PORT) as url,
        urllib.request.urlopen(url, timeout=60) as response,
    ):
        assert response.status == 200


@pytest.mark.own_cluster
@pytest.mark.parametrize("service_name", ["kubelet", "containerd"])
def test_pods_outlive_the_services_of_their_node(
    kubectl: Kubectl, images: Images, node_names: list[str], service_name: str
) -> None:
    kubectl.apply(named_pod("server", pod(images.penstock, SERVE, node_names[0])))
    kubectl.wait("--for=condition=Ready", "pod/server")
    faults.kill(node_names[0], service_name)
    eventually(
        lambda: kubectl.exec("server", "cat", "/proc/1/comm").strip() == "python3",
        "exec through the new one",
        BACK_S,
        [AssertionError],
    )
    [status] = kubectl.get("pod", "server")["status"]["containerStatuses"]
    assert status["restartCount"] == 0


@pytest.mark.own_cluster
def test_the_api_server_can_be_away_for_a_while(cluster: Kubectl, node_names: list[str]) -> None:
    with faults.halted("control", "kube-apiserver"):
        hung = cluster.run("get", "nodes", "--request-timeout=2s")
        assert hung.returncode != 0
    eventually(
        lambda: len(cluster.items("nodes")) == len(node_names), "answers again", BACK_S, [AssertionError]
    )
    faults.kill("control", "kube-apiserver")
    refused = cluster.run("get", "nodes", "--request-timeout=2s")
    assert refused.returncode != 0
    eventually(
        lambda: len(cluster.items("nodes")) == len(node_names), "answers again", BACK_S, [AssertionError]
    )


@pytest.mark.own_cluster
def test_nodes_can_claim_gpus(
    cluster: Kubectl, kubectl: Kubectl, images: Images, node_names: list[str]
) -> None:
    node = node_names[0]
    two_gpus = {"limits": {"nvidia.com/gpu": "2"}}
    kubectl.apply(
        deployment("fits", pod(images.penstock, WAIT, resources=two_gpus)),
        deployment("waits", pod(images.penstock, WAIT, resources=two_gpus)),
    )
    time.sleep(1)
    assert not [found for found in kubectl.items("pods") if is_ready(found)]
    lifecycle.gpus(node, 3)
    try:
        eventually(
            lambda: [is_ready(found) for found in kubectl.items("pods")].count(True) == 1,
            "one of the two has its GPUs",
            BACK_S,
        )
        [placed] = [found["spec"]["nodeName"] for found in kubectl.items("pods") if is_ready(found)]
        assert placed == node
    finally:
        lifecycle.gpus(node, 0)
