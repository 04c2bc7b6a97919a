"""deploy/vllm-cpu.yaml on the cluster: vLLM in pods of two nodes, and KV that NIXL moves between them.

`make test-kubernetes-vllm` runs it. On the project's own cluster, the image is made and given to the nodes.
On another, PENSTOCK_TEST_VLLM_IMAGE names one that it can pull: Penstock with vLLM's CPU build, and with
models/tiny, curl and ss.
"""

from __future__ import annotations

import os
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from checks.kubernetes.cluster import lifecycle, vllm_image
from checks.kubernetes.conftest import REPORT, given_kubeconfig
from checks.kubernetes.graphs import ANSWER, DEPLOY, MESSAGES, ask, wait_gone, wait_ready
from checks.kubernetes.kubectl import Kubectl

GRAPH = "vllm-cpu"
MODEL = "models/tiny"  # as the manifest has it: the operator cannot know that it is a folder in the image
READY_S = 600.0  # two engines that start at once, on two cores
TRANSFER = re.compile(
    r"KV transfer done: .*transport=vllm-nixl blocks=(\d+) from=(\S+) first_token_ms=([\d.]+)"
)
LONG_PROMPTS = 10
BLOCK_BYTES = 65536  # of models/tiny: 32 tokens in float32


@pytest.fixture(scope="module")
def image(cluster: Kubectl) -> Iterator[str]:
    if given_kubeconfig() is not None:
        yield os.environ.get("PENSTOCK_TEST_VLLM_IMAGE", vllm_image.NAME)
        return
    running = lifecycle.running()
    assert running is not None
    environment = Path(os.environ["PENSTOCK_VLLM_ENVIRONMENT"])
    with vllm_image.on_nodes(environment, range(1, running.nodes + 1)) as name:
        yield name


@pytest.fixture(params=[2, 1], ids=["two nodes", "one node"])
def graph(
    platform: Kubectl, image: str, node_names: list[str], request: pytest.FixtureRequest
) -> Iterator[Kubectl]:
    """The shipped graph, ready, with its two workers on so many nodes."""
    places = (node_names[0], node_names[request.param - 1])
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "vllm-cpu.yaml").read_text())
    found["metadata"]["annotations"] = {"penstock.dev/image": image}
    # On two cores that other work slows down, computing and moving a prompt take about as long: which one a
    # frontend prefers would be chance.
    frontend = found["spec"]["services"]["Frontend"]["extraPodSpec"]["mainContainer"]
    frontend["args"] += ["--disagg", "always"]
    for service, node in zip(("PrefillWorker", "DecodeWorker"), places, strict=True):
        pod = found["spec"]["services"][service]["extraPodSpec"]
        pod["nodeSelector"] = {"kubernetes.io/hostname": node}
    began = time.monotonic()
    try:
        platform.apply(found)
        wait_ready(platform, GRAPH, READY_S, frontend="1/1", prefill="1/1", decode="1/1")
        print(f"ready after {time.monotonic() - began:.0f} s")
        yield platform
    finally:
        report = request.node.stash.get(REPORT, None)
        if report is None or report.failed:
            print(platform.story())
        platform("delete", "dynamographdeployment", GRAPH, "--ignore-not-found")
        wait_gone(platform)


def test_nixl_moves_kv_between_pods(graph: Kubectl) -> None:
    prefill, decode = the_pod(graph, "prefill"), the_pod(graph, "decode")

    with graph.port_forward(f"svc/{GRAPH}-frontend", 8000) as url:
        # The name can only be answered from KV that was moved.
        began = time.monotonic()
        assert ask(url, MESSAGES, model=MODEL) == ANSWER
        print(f"first answer in {time.monotonic() - began:.2f} s")
        first = transfers(graph, decode)
        assert [(blocks, source) for blocks, source, _ in first] == [(3, prefill["metadata"]["name"])]

        for number in range(LONG_PROMPTS):
            ask(url, [{"role": "user", "content": f"{number} is my number. " * 60}], model=MODEL)
        counted = metric(url, "penstock_transferred_blocks_total")
    moved = transfers(graph, decode)[1:]
    assert len(moved) == LONG_PROMPTS

    blocks = sum(transfer[0] for transfer in (*first, *moved))
    assert counted == blocks
    received = bytes_received(graph, decode, prefill)
    assert received >= blocks * BLOCK_BYTES  # also on one node: its pods share no memory
    times = sorted(ms for _, _, ms in moved)
    print(
        f"{blocks} blocks, {received} bytes from {prefill['status']['podIP']} to"
        f" {decode['status']['podIP']}; first token of the first {first[0][2]:.0f} ms after it came to the"
        f" decode worker, of {len(moved)} more {times[0]:.0f} to {times[-1]:.0f} ms"
    )


def the_pod(kubectl: Kubectl, role: str) -> dict[str, Any]:
    [pod] = kubectl.items("pods", "-l", f"app={GRAPH},role={role}")
    return pod


def transfers(kubectl: Kubectl, decode: dict[str, Any]) -> list[tuple[int, str, float]]:
    """Blocks, the pod that they came from, and milliseconds to the first token, by the worker's log."""
    log = kubectl("logs", decode["metadata"]["name"])
    return [(int(blocks), source, float(ms)) for blocks, source, ms in TRANSFER.findall(log)]


def metric(url: str, name: str) -> float:
    """What a frontend counts."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=20) as response:
        text = response.read().decode()
    [value] = re.findall(rf"^{name} (\S+)$", text, re.MULTILINE)
    return float(value)


def bytes_received(kubectl: Kubectl, by: dict[str, Any], sender: dict[str, Any]) -> int:
    """Over all TCP connections that are open between two pods."""
    told = kubectl.exec(by["metadata"]["name"], "ss", "-tinH", "dst", sender["status"]["podIP"])
    return sum(map(int, re.findall(r"bytes_received:(\d+)", told)))
