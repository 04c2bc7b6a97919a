"""A graph under load, while people and machines do to it what they do: scaled, rolled, drained, cut off,
orphaned.

Whatever happens, each of 20 clients gets every answer, whole and right.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from checks.kubernetes import faults
from checks.kubernetes.graphs import (
    ANSWER,
    GONE_S,
    READY_S,
    SHIPPED,
    Images,
    ask,
    manifest,
    under_load,
    wait_gone,
    wait_ready,
)
from checks.kubernetes.kubectl import Kubectl, eventually

AWAY_S = 60.0
PATCH_S = 120.0
SOON_S = 120.0
DEPLOYMENTS = ("prefillworker", "decodeworker", "frontend")
PLAIN = Path(__file__).parent / "manifests" / "disaggregated.yaml"
GRAPH = "dynamographdeployment/multinode-vllm"
STEADY, OTHER = "node1", "node2"
"""The node of clients and frontends, and the one to which things are done: the test cluster's."""

pytestmark = pytest.mark.own_cluster


@pytest.fixture(scope="module")
def graph(platform: Kubectl, images: Images) -> Iterator[Kubectl]:
    """kubectl in the namespace of a graph with two frontends. The frontends prefer one node, workers are
    spread."""
    found = manifest(SHIPPED, images)
    services = found["spec"]["services"]
    services["Frontend"]["replicas"] = 2
    services["DecodeWorker"]["scalingAdapter"] = {"enabled": True}
    preferred = {
        "weight": 100,
        "preference": {
            "matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [STEADY]}]
        },
    }
    affinity = {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [preferred]}}
    services["Frontend"]["extraPodSpec"] |= {"affinity": affinity, "topologySpreadConstraints": []}
    platform.apply(found)
    wait_ready(platform, frontend="2/2", prefill="2/2", decode="2/2")
    yield platform
    platform("delete", "dynamographdeployments", "--all")
    wait_gone(platform)


def patch(kubectl: Kubectl, **spec: object) -> None:
    """As the document does. While no operator answers, the API server cannot convert versions of graphs,
    and refuses: then it is tried again, as a person would."""
    command = ["patch", GRAPH, "--type=merge", "-p", json.dumps({"spec": spec})]
    eventually(lambda: kubectl(*command), "the patch is taken", PATCH_S, [AssertionError])


def pods_of(kubectl: Kubectl, role: str) -> list[str]:
    return [
        item["metadata"]["name"] for item in kubectl.items("pods", "-l", f"app=multinode-vllm,role={role}")
    ]


def test_scaled_up_and_down(graph: Kubectl, images: Images) -> None:
    with under_load(graph, images.penstock, STEADY) as load:
        patch(graph, services={"PrefillWorker": {"replicas": 3}})
        adapter = "dynamographdeploymentscalingadapter/multinode-vllm-decodeworker"
        graph("scale", adapter, "--replicas=4")
        wait_ready(graph, prefill="3/3", decode="4/4")
        graph("scale", adapter, "--replicas=2")
        patch(graph, services={"PrefillWorker": {"replicas": 2}})
        wait_ready(graph, prefill="2/2", decode="2/2")
    load.check()


def test_every_service_rolled_twice(graph: Kubectl, images: Images) -> None:
    with under_load(graph, images.penstock, STEADY) as load:
        for number in ("first", "second"):
            before = {name for role in ("frontend", "prefill", "decode") for name in pods_of(graph, role)}
            patch(graph, restart={"id": number})
            wait_ready(graph)
            left = before & {n for role in ("frontend", "prefill", "decode") for n in pods_of(graph, role)}
            assert left == set()
    load.check()


def test_a_bad_flag_stops_the_roll_and_the_old_manifest_brings_it_back(
    graph: Kubectl, images: Images
) -> None:
    bad = manifest(SHIPPED, images)["spec"]["services"]["DecodeWorker"]["extraPodSpec"]
    args = bad["mainContainer"]["args"]
    with under_load(graph, images.penstock, STEADY) as load:
        bad["mainContainer"]["args"] = [
            *args,
            "--kv-cache-mib",
            "1",
            "--block-size",
            "1024",
        ]  # not one block
        patch(graph, services={"DecodeWorker": {"extraPodSpec": bad}})

        def told() -> bool:
            status = graph.get("dynamographdeployments", "multinode-vllm")["status"]
            ready = next(found for found in status["conditions"] if found["type"] == "Ready")
            return status["state"] == "failed" and "are less than one block" in ready["message"]

        eventually(told, "the status tells of the flag", READY_S)
        bad["mainContainer"]["args"] = args
        patch(graph, services={"DecodeWorker": {"extraPodSpec": bad}})
        wait_ready(graph, decode="2/2")
    load.check()


def test_pods_deleted_by_hand_and_the_operator_killed_again_and_again(
    graph: Kubectl, images: Images
) -> None:
    with under_load(graph, images.penstock, STEADY) as load:
        for number in range(2):  # each further kill would be answered by a longer pause of the kubelet's
            operators = graph.items("pods", "-l", "app.kubernetes.io/name=penstock-operator")
            for found in operators:
                faults.kill_container(graph, found["metadata"]["name"])
            patch(graph, services={"PrefillWorker": {"replicas": 3 - number}})
            for role in ("prefill", "decode"):
                graph("delete", "pod", pods_of(graph, role)[0], "--wait=false")
            time.sleep(3)
        wait_ready(graph, prefill="2/2", decode="2/2")
    load.check()


def test_a_drained_node(graph: Kubectl, images: Images) -> None:
    with under_load(graph, images.penstock, STEADY) as load:
        try:
            options = ["--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=180s"]
            graph("drain", OTHER, *options, timeout_s=200)
            wait_ready(graph, prefill="2/2", decode="2/2")
        finally:
            graph("uncordon", OTHER)
        patch(graph, restart={"id": "spread again"})
        wait_ready(graph)
    load.check()


def test_a_node_frozen_and_then_cut_off(graph: Kubectl, images: Images) -> None:
    with under_load(graph, images.penstock, STEADY) as load:
        with faults.frozen(OTHER):
            time.sleep(10)
        time.sleep(5)
        with faults.cut_off(OTHER):
            time.sleep(10)
        time.sleep(5)
    load.check()


def test_the_api_server_away(graph: Kubectl, images: Images) -> None:
    """Nothing changes for those who are served, and what is asked for afterwards happens.

    The clients name a frontend by its address: when an API server is back after 40 s or more, the cluster
    takes all nodes for dead for a moment, and its DNS and Services (those of any program) have no pods
    then.
    """
    frontend = graph.get("pod", pods_of(graph, "frontend")[0])["status"]["podIP"]
    with under_load(graph, images.penstock, STEADY, host=frontend) as load:
        with faults.frozen("control"):
            time.sleep(AWAY_S)
        eventually(lambda: graph.run("get", "nodes").returncode == 0, "the API server answers", SOON_S)
        patch(graph, services={"PrefillWorker": {"replicas": 3}})
        wait_ready(graph, prefill="3/3")
        patch(graph, services={"PrefillWorker": {"replicas": 2}})
        wait_ready(graph, prefill="2/2")
    load.check()


def test_links_whose_secrets_were_deleted(graph: Kubectl, images: Images) -> None:
    """The operator makes them again. Who runs goes on, and who starts meets those who run."""
    with under_load(graph, images.penstock, STEADY) as load:
        secrets = [f"secret/multinode-vllm-link-{side}" for side in ("worker", "frontend", "ca")]
        for secret in secrets:
            graph("delete", secret)
        eventually(lambda: graph.run("get", *secrets).returncode == 0, "they are there again", SOON_S)
        graph("delete", "pod", *[pods_of(graph, role)[0] for role in ("frontend", "prefill", "decode")])
        wait_ready(graph)
    load.check()


def test_instances_found_in_etcd(graph: Kubectl, images: Images) -> None:
    """The same manifest with another annotation."""
    documents = yaml.safe_load_all(PLAIN.read_text().replace("etcd:3.4", images.etcd))
    graph.apply(*(found for found in documents if found["metadata"]["name"] == "etcd"))
    graph.rolled_out("deployment/etcd")
    found = manifest(SHIPPED, images, **{"penstock.dev/discovery": "etcd://etcd:2379"})
    found["metadata"]["name"] = "by-etcd"
    graph.apply(found)
    try:
        wait_ready(graph, "by-etcd", prefill="2/2", decode="2/2")
        with graph.port_forward("service/by-etcd-frontend", 8000) as url:
            assert ask(url) == ANSWER
    finally:
        graph("delete", "dynamographdeployment", "by-etcd", "--wait=false")
        graph("delete", "deployment,service", "etcd", "--wait=false")


def test_a_graph_that_is_deleted_while_it_starts_is_gone_at_once(graph: Kubectl, images: Images) -> None:
    """And not after the grace periods of pods that were not told in time, 225 s."""
    found = manifest(SHIPPED, images)
    found["metadata"]["name"] = "brief"
    graph.apply(found)
    selector = ("-l", "app=brief")
    eventually(lambda: graph.items("pods", *selector), "its pods are there", SOON_S)
    graph("delete", "dynamographdeployment", "brief")

    def all_gone() -> bool:
        left = graph("get", "pods", *selector, "-o", "wide")
        assert not left, left
        return True

    eventually(all_gone, "its pods are gone", GONE_S, [AssertionError])
