"""Graphs on the cluster: the operator installed as users do it, manifests applied, clients that ask."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.kubernetes.cluster.places import CHECKOUT
from tests.kubernetes.conftest import Images
from tests.kubernetes.kubectl import Kubectl, eventually
from tests.kubernetes.pods import named_pod, pod

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


def wait_ready(
    kubectl: Kubectl, name: str = "multinode-vllm", timeout_s: float = READY_S, /, **ready: str
) -> None:
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

    eventually(holds, f"the graph {name} is ready {ready or ''}", timeout_s, [AssertionError])


def wait_gone(kubectl: Kubectl) -> None:
    """Until nothing is left of any graph in the namespace."""
    kinds = "pods,deployments,replicasets,services,secrets,serviceaccounts,roles,rolebindings,pdb,pvc"

    def left() -> str:
        return kubectl("get", kinds, "-l", "nvidia.com/dynamo-graph-deployment-name", "-o", "name")

    eventually(lambda: left() == "", "nothing is left of the graphs", GONE_S)


def ask(
    url: str, messages: Sequence[dict[str, str]] = MESSAGES, max_tokens: int = 50, model: str = MODEL
) -> str:
    """An answer, streamed to its end."""
    body = {"model": model, "messages": messages, "max_tokens": max_tokens, "stream": True}
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


CLIENT = """
import json, os, sys, threading, time, urllib.request

url, clients, body, wanted = sys.argv[1], int(sys.argv[2]), sys.argv[3].encode(), sys.argv[4]
told = {"answers": 0, "wrong": [], "errors": [], "longest_s": 0.0}
stop = threading.Event()

def ask():
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
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

def run():
    while not stop.is_set():
        began = time.time()
        try:
            text = ask()
            told["answers"] += 1
            if text != wanted:
                told["wrong"].append(text)
        except Exception as error:
            told["errors"].append(f"after {time.time() - began:.1f} s: {error!r}")
        told["longest_s"] = max(told["longest_s"], round(time.time() - began, 2))
        stop.wait(0.2)

threads = [threading.Thread(target=run) for _ in range(clients)]
for thread in threads:
    thread.start()
while not os.path.exists("/tmp/stop"):
    time.sleep(0.2)
stop.set()
for thread in threads:
    thread.join()
print(json.dumps(told), flush=True)
"""
"""Clients in a pod, as most are: they reach frontends by the Service. Told to stop, they print what became
of their requests."""


@dataclass
class Load:
    """What became of the requests of several clients, each asking again and again."""

    answers: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    longest_s: float = 0.0

    def check(self) -> None:
        """All were answered, and rightly."""
        total = self.answers + len(self.errors)
        assert self.errors == [], f"{len(self.errors)} of {total} failed"
        assert self.wrong == []
        assert self.answers > 20


@contextlib.contextmanager
def under_load(
    kubectl: Kubectl, image: str, node: str, host: str = "multinode-vllm-frontend", clients: int = 20
) -> Iterator[Load]:
    """Clients that ask `host` meanwhile, from a pod on this node."""
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 50, "stream": True}
    url = f"http://{host}:8000/v1/chat/completions"
    command = ["python3", "-u", "-c", CLIENT, url, str(clients), json.dumps(body), ANSWER]
    name = f"client-{secrets.token_hex(3)}"
    spec = pod(image, command, node) | {"restartPolicy": "Never"}
    kubectl.apply(named_pod(name, spec))
    kubectl.wait(f"pod/{name}", "--for=condition=Ready")
    load = Load()
    try:
        yield load
        kubectl.exec(name, "touch", "/tmp/stop")
        eventually(
            lambda: kubectl.get("pod", name)["status"]["phase"] == "Succeeded", "the clients end", 150
        )
        told = json.loads(kubectl("logs", name).splitlines()[-1])
        load.answers, load.wrong, load.errors = told["answers"], told["wrong"], told["errors"]
        load.longest_s = told["longest_s"]
        print(f"{load.answers} answers, {len(load.errors)} errors, longest {load.longest_s:.2f} s")
    finally:
        kubectl("delete", "pod", name, "--wait=false", "--grace-period=1")
