"""Graphs on the cluster: the operator installed as users do it, manifests applied, clients that ask."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from checks.kubernetes import client
from checks.kubernetes.cluster.places import CHECKOUT
from checks.kubernetes.kubectl import Kubectl, eventually
from checks.kubernetes.pods import named_pod, pod

DEPLOY = CHECKOUT / "deploy"
SHIPPED = DEPLOY / "multinode-vllm.yaml"
UPSTREAM = CHECKOUT / "tests" / "operator" / "manifests" / "upstream-multinode-vllm.yaml"
ON_CPUS = {"penstock.dev/engine": "reference", "penstock.dev/model": "/models/tiny"}
"""What lets a manifest for GPUs and a model of the hub run on the test cluster."""

READY_S = 180.0
GONE_S = 200.0
"""For all of a graph to go. Before Kubernetes 1.27, a kubelet that prepares a pod looks for the graph's
deleted secret for 123 s before it ends the pod (its issue 100219)."""

MODEL = "Qwen/Qwen3-0.6B"
MESSAGES = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "My name is Alice."},
    {"role": "assistant", "content": "Hello Alice! Nice to meet you."},
    {"role": "user", "content": "What is my name?"},
]
ANSWER = "Your name is Alice."


@dataclass(frozen=True)
class Images:
    """Names of images that the cluster's nodes can run."""

    penstock: str
    etcd: str


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
    return client.ask(f"{url}/v1/chat/completions", request_body(messages, max_tokens, model))


def request_body(
    messages: Sequence[dict[str, str]] = MESSAGES, max_tokens: int = 50, model: str = MODEL
) -> bytes:
    body = {"model": model, "messages": messages, "max_tokens": max_tokens, "stream": True}
    return json.dumps(body).encode()


@dataclass
class Load:
    """What became of the requests of several clients, each asking again and again."""

    answers: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    unresolved: int = 0
    """How often the cluster's DNS did not know the frontend's name, or did not answer."""

    longest_s: float = 0.0

    def check(self) -> None:
        """All were answered, and rightly."""
        total = self.answers + len(self.errors)
        assert self.errors == [], f"{len(self.errors)} of {total} failed"
        assert self.wrong == []
        assert self.answers > 20
        # A question or two lost on the way is the cluster's; a Service that is away costs hundreds.
        assert self.unresolved <= self.answers / 100, f"not resolved {self.unresolved} times"


@contextlib.contextmanager
def under_load(
    kubectl: Kubectl, image: str, node: str, host: str = "multinode-vllm-frontend", clients: int = 20
) -> Iterator[Load]:
    """Clients that ask `host` meanwhile, from a pod on this node."""
    url = f"http://{host}:8000/v1/chat/completions"
    text = Path(client.__file__).read_text()
    command = ["python3", "-u", "-c", text, url, str(clients), request_body().decode(), ANSWER]
    name = f"client-{secrets.token_hex(3)}"
    spec = pod(image, command, node) | {"restartPolicy": "Never"}
    kubectl.apply(named_pod(name, spec))
    kubectl.wait(f"pod/{name}", "--for=condition=Ready")
    load = Load()
    try:
        yield load
        kubectl.exec(name, "touch", client.STOP_FILE)
        eventually(
            lambda: kubectl.get("pod", name)["status"]["phase"] == "Succeeded", "the clients end", 150
        )
        told = json.loads(kubectl("logs", name).splitlines()[-1])
        load.answers, load.wrong, load.errors = told["answers"], told["wrong"], told["errors"]
        load.unresolved, load.longest_s = told["unresolved"], told["longest_s"]
        print(
            f"{load.answers} answers, {len(load.errors)} errors, longest {load.longest_s:.2f} s,"
            f" name not resolved {load.unresolved} times"
        )
    finally:
        kubectl("delete", "pod", name, "--wait=false", "--grace-period=1")
