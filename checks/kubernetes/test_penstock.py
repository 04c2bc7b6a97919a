"""Penstock in pods without the operator, by plain manifests and over etcd: workers on two nodes answer
together."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from checks.kubernetes import faults
from checks.kubernetes.graphs import Images
from checks.kubernetes.kubectl import Kubectl, eventually, is_ready

MANIFEST = Path(__file__).parent / "manifests" / "disaggregated.yaml"
ROLES = ("prefill", "decode")
STARTS_S = 180.0
LOGGED_S = 60.0
MESSAGES = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "My name is Alice."},
    {"role": "assistant", "content": "Hello Alice! Nice to meet you."},
    {"role": "user", "content": "What is my name?"},
]
ANSWER = "Your name is Alice."


@pytest.fixture
def graph(kubectl: Kubectl, images: Images) -> Kubectl:
    """kubectl in a namespace where all of the manifest runs."""
    manifest = (
        MANIFEST.read_text().replace("penstock:dev", images.penstock).replace("etcd:3.4", images.etcd)
    )
    kubectl.apply_text(manifest)
    names = [f"deployment/{name}" for name in ("etcd", "frontend", *ROLES)]
    kubectl.rolled_out(*names, timeout_s=STARTS_S)
    return kubectl


def ask(url: str, messages: Sequence[dict[str, str]] = MESSAGES) -> str:
    body = json.dumps({"model": "tiny", "messages": messages, "max_tokens": 50}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        answer: str = json.load(response)["choices"][0]["message"]["content"]
    return answer


@dataclass
class Load:
    """What became of requests that one client sent, one after another."""

    answers: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@contextlib.contextmanager
def under_load(url: str) -> Iterator[Load]:
    """Ask again and again inside the `with` block."""
    load = Load()
    ended = threading.Event()

    def run() -> None:
        while not ended.is_set():
            try:
                load.answers.append(ask(url))
            except (OSError, KeyError) as error:
                load.errors.append(repr(error))
            time.sleep(0.05)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield load
    finally:
        ended.set()
        thread.join()


def nodes_of(kubectl: Kubectl, role: str) -> set[str]:
    return {found["spec"]["nodeName"] for found in kubectl.items("pods", "-l", f"app={role}")}


def test_a_question_is_answered_by_two_workers(graph: Kubectl) -> None:
    for role in ROLES:
        assert len(nodes_of(graph, role)) == 2, f"{role} workers are on one node only"
    with graph.port_forward("service/frontend", 8000) as url:
        assert ask(url) == ANSWER
        with urllib.request.urlopen(f"{url}/health", timeout=60) as response:
            health = json.load(response)
    assert [found["state"] for found in health["instances"]] == ["ready"] * 4
    assert len(logged_decisions(graph, 1)) == 1


def test_kv_moves_between_nodes(graph: Kubectl) -> None:
    node_of = {pod["metadata"]["name"]: pod["spec"]["nodeName"] for pod in graph.items("pods")}
    with graph.port_forward("service/frontend", 8000) as url:
        for number in range(20):  # which workers serve a prompt is the router's choice
            ask(url, [{"role": "user", "content": f"{number} is my number. What is yours?"}])
            prefill, decode = logged_decisions(graph, number + 1)[number]
            if node_of[prefill] != node_of[decode]:
                break
    assert node_of[prefill] != node_of[decode], (
        "no prompt was computed on one node and decoded on the other"
    )
    moved = re.compile(rf"KV transfer.*{prefill}")
    eventually(lambda: moved.search(graph("logs", decode)), "the transfer is logged", LOGGED_S)


def logged_decisions(graph: Kubectl, count: int) -> list[tuple[str, str]]:
    """What `decisions` gives, once there are so many: its node has a line a little after it was written."""
    eventually(lambda: len(decisions(graph)) >= count, f"{count} decisions are logged", LOGGED_S)
    return decisions(graph)


def decisions(graph: Kubectl) -> list[tuple[str, str]]:
    """The prefill and the decode worker of each request so far, as the frontend's log says."""
    log = graph("logs", "deployment/frontend", "--tail=-1")
    return [
        (prefill, decode)
        for decode, prefill in re.findall(
            r"routing decision: .*path=remote decode=(\S+) prefill=(\S+)", log
        )
    ]


@pytest.mark.own_cluster
@pytest.mark.parametrize("role", ROLES)
def test_requests_survive_a_killed_worker(graph: Kubectl, role: str) -> None:
    with graph.port_forward("service/frontend", 8000) as url, under_load(url) as load:
        time.sleep(1)
        victim = graph.items("pods", "-l", f"app={role}")[0]["metadata"]["name"]
        faults.kill_container(graph, victim)

        def is_back() -> bool:
            found = graph.get("pod", victim)
            return found["status"]["containerStatuses"][0]["restartCount"] > 0 and is_ready(found)

        eventually(is_back, "the worker is back", STARTS_S)
    assert load.errors == []
    assert set(load.answers) == {ANSWER}
