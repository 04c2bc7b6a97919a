"""Graphs on the cluster: the operator installed as users do it, manifests applied, clients that ask."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.kubernetes.cluster.places import CHECKOUT
from tests.kubernetes.conftest import Images
from tests.kubernetes.kubectl import Kubectl, eventually

DEPLOY = CHECKOUT / "deploy"
SHIPPED = DEPLOY / "multinode-vllm.yaml"
UPSTREAM = CHECKOUT / "tests" / "operator" / "manifests" / "upstream-multinode-vllm.yaml"
ON_CPUS = {"penstock.dev/engine": "reference", "penstock.dev/model": "/models/tiny"}
"""What lets a manifest for GPUs and a model of the hub run on the test cluster."""

READY_S = 180.0
GONE_S = 120.0
MODEL = "Qwen/Qwen3-0.6B"
MESSAGES = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "My name is Alice."},
    {"role": "assistant", "content": "Hello Alice! Nice to meet you."},
    {"role": "user", "content": "What is my name?"},
]
ANSWER = "Your name is Alice."


def script(kubectl: Kubectl, *command: str | Path, timeout_s: float = 300, **variables: str) -> str:
    """What one of deploy/'s scripts printed. Fails the test with that when it fails."""
    path = f"{kubectl.program.parent}:{os.environ['PATH']}"
    environment = {**kubectl.environment, "PATH": path, "HOME": str(kubectl.cache), **variables}
    done = subprocess.run(
        [str(word) for word in command],
        env=environment,
        cwd=DEPLOY,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def manifest(source: Path, images: Images, **annotations: str) -> dict[str, Any]:
    """A shipped or upstream manifest, with annotations by which it runs here, and nothing else changed."""
    found: dict[str, Any] = yaml.safe_load(source.read_text())
    asked = found["metadata"].setdefault("annotations", {})
    asked |= ON_CPUS | {"penstock.dev/image": images.penstock} | annotations
    return found


def wait_ready(kubectl: Kubectl, name: str = "multinode-vllm", **ready: str) -> None:
    """Until a graph is ready, with these replicas by role (`prefill="3/3"`)."""

    def holds() -> bool:
        found = kubectl.get("dynamographdeployments.v1alpha1.nvidia.com", name)
        status = found.get("status") or {}
        counts = status.get("ready") or {}
        return (
            status.get("observedGeneration") == found["metadata"]["generation"]
            and status.get("state") == "successful"
            and all(counts.get(role) == count for role, count in ready.items())
        )

    eventually(holds, f"the graph {name} is ready {ready or ''}", READY_S, [AssertionError])


def wait_gone(kubectl: Kubectl) -> None:
    """Until nothing is left of any graph in the namespace."""
    kinds = "pods,deployments,replicasets,services,secrets,serviceaccounts,roles,rolebindings,pdb,pvc"

    def left() -> str:
        return kubectl("get", kinds, "-l", "nvidia.com/dynamo-graph-deployment-name", "-o", "name")

    eventually(lambda: left() == "", "nothing is left of the graphs", GONE_S)


def ask(url: str, messages: Sequence[dict[str, str]] = MESSAGES, max_tokens: int = 50) -> str:
    """An answer, streamed to its end."""
    body = {"model": MODEL, "messages": messages, "max_tokens": max_tokens, "stream": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    text, finished = "", False
    with urllib.request.urlopen(request, timeout=120) as response:
        for line in response:
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise ValueError(chunk["error"])
                for choice in chunk["choices"]:
                    text += choice["delta"].get("content") or ""
                    finished = finished or choice.get("finish_reason") is not None
    if not finished:
        raise ValueError(f"the stream ended early: {text!r}")
    return text


@dataclass
class Load:
    """What became of requests of several clients, each asking again and again."""

    answers: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    longest_s: float = 0.0

    def check(self) -> None:
        """All were answered, and rightly."""
        assert self.errors == [], f"{len(self.errors)} of {len(self.answers) + len(self.errors)} failed"
        wrong = [answer for answer in self.answers if answer != ANSWER]
        assert wrong == []
        assert len(self.answers) > 20


@contextlib.contextmanager
def under_load(url: str, clients: int = 20, pause_s: float = 0.2) -> Iterator[Load]:
    """Clients that ask meanwhile."""
    load = Load()
    ended = threading.Event()

    def run() -> None:
        while not ended.is_set():
            began = time.monotonic()
            try:
                load.answers.append(ask(url))
            except (OSError, KeyError, ValueError) as error:
                load.errors.append(f"after {time.monotonic() - began:.1f} s: {error!r}")
            load.longest_s = max(load.longest_s, time.monotonic() - began)
            ended.wait(pause_s)

    threads = [threading.Thread(target=run, name=f"client {number}") for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield load
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    print(f"{len(load.answers)} answers, {len(load.errors)} errors, longest {load.longest_s:.2f} s")
