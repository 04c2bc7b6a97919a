"""Every command of the multi-node example's document, in its order and as it stands there, on the cluster.

Both with the manifest that Penstock ships and with the one that it was written for, of Dynamo 0.4.0. What
differs from the document is what the test cluster lacks: GPUs and the hub, for which an annotation names an
engine and a model.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import yaml

from checks.kubernetes.graphs import (
    ANSWER,
    DEPLOY,
    SHIPPED,
    UPSTREAM,
    Images,
    ask,
    manifest,
    script,
    wait_gone,
    wait_ready,
)
from checks.kubernetes.kubectl import Kubectl, eventually

FOLLOW_S = 90.0
CURLS = [
    r"""curl -X POST http://localhost:8000/v1/chat/completions \
  -H 'Content-Type: application/json' \
  -d '{
    "model": "Qwen/Qwen3-0.6B",
    "messages": [
      {"role": "system", "content": "You are a helpful assistant."},
      {"role": "user", "content": "Explain disaggregated serving benefits"}
    ],
    "max_tokens": 200,
    "temperature": 0.7
  }'""",
    r"""curl -X POST http://localhost:8000/v1/chat/completions \
  -H 'Content-Type: application/json' \
  -d '{
    "model": "Qwen/Qwen3-0.6B",
    "messages": [
      {"role": "system", "content": "You are a helpful assistant."},
      {"role": "user", "content": "My name is Alice."},
      {"role": "assistant", "content": "Hello Alice! Nice to meet you."},
      {"role": "user", "content": "What is my name?"}
    ],
    "max_tokens": 50
  }'""",
]
PATCHES = {
    "prefill": "kubectl patch dynamographdeployment multinode-vllm -n dynamo-cloud -p"
    """ '{"spec":{"services":{"PrefillWorker":{"replicas":3}}}}'""",
    "decode": "kubectl patch dynamographdeployment multinode-vllm -n dynamo-cloud -p"
    """ '{"spec":{"services":{"DecodeWorker":{"replicas":4}}}}'""",
}


class Shell:
    """A user's shell, in a folder with the manifest, with kubectl and its preference on their places."""

    def __init__(self, kubectl: Kubectl, folder: Path) -> None:
        self.folder = folder
        newest = Path("/usr/lib/google-cloud-sdk/bin/kubectl.1.33")
        self.reads_preferences = newest.exists()
        programs = folder / "bin"
        programs.mkdir()
        shutil.copy(newest if newest.exists() else kubectl.program, programs / "kubectl")
        home = folder / "home"
        (home / ".kube").mkdir(parents=True)
        shutil.copy(DEPLOY / "kuberc.yaml", home / ".kube" / "kuberc")
        self.environment = {
            **kubectl.environment,
            "HOME": str(home),
            "PATH": f"{programs}:{os.environ['PATH']}",
            "KUBECTL_KUBERC": "true",
        }

    def __call__(self, command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    def until(self, command: str, wanted: str) -> None:
        """Wait until a command that never ends has printed this."""
        process = self.started(command)
        assert process.stdout is not None
        printed: list[str] = []

        def read(lines: Iterable[str]) -> None:
            for line in lines:
                printed.append(line)  # noqa: PERF402 - each as it comes

        reading = threading.Thread(target=read, args=(process.stdout,))
        reading.start()
        try:
            eventually(
                lambda: any(wanted in line for line in printed), f"{wanted} from {command}", FOLLOW_S
            )
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=60)
            reading.join()
            process.stdout.close()

    def started(self, command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def end(self, process: subprocess.Popen[str]) -> str:
        """What it printed."""
        os.killpg(process.pid, signal.SIGTERM)
        printed, _ = process.communicate(timeout=60)
        return printed


@pytest.fixture
def shell(platform: Kubectl, tmp_path: Path) -> Iterator[Shell]:
    yield Shell(platform, tmp_path)
    platform("delete", "dynamographdeployments", "--all", "--ignore-not-found")
    wait_gone(platform)


@pytest.mark.parametrize("source", [SHIPPED, UPSTREAM], ids=["shipped", "upstream"])
def test_every_command_of_the_document(
    shell: Shell, platform: Kubectl, images: Images, source: Path
) -> None:
    found = manifest(source, images, **{"penstock.dev/log-relays": "true"})
    (shell.folder / "multinode-vllm.yaml").write_text(yaml.safe_dump(found))

    # Deployment
    shell("kubectl apply -f multinode-vllm.yaml -n dynamo-cloud")
    wait_ready(platform, frontend="1/1", prefill="2/2", decode="2/2")

    # Testing
    forward = shell.started("kubectl port-forward svc/multinode-vllm-frontend 8000:8000 -n dynamo-cloud")
    try:
        eventually(
            lambda: shell("curl -sf http://localhost:8000/live"), "the port", FOLLOW_S, [AssertionError]
        )
        assert '"status":"healthy"' in shell("curl http://localhost:8000/health").replace(" ", "")
        assert '"finish_reason"' in shell(CURLS[0])
        assert ANSWER in shell(CURLS[1])
        # Until a prompt was computed by one worker and decoded by another.
        for number in range(20):
            ask("http://localhost:8000", [{"role": "user", "content": f"{number} is my number. " * 20}])
    finally:
        shell.end(forward)

    # Monitoring
    pods = shell("kubectl get pods -n dynamo-cloud -l app=multinode-vllm")
    assert len(re.findall(r"^multinode-vllm-\S+ +1/1 +Running", pods, re.MULTILINE)) == 5
    for role in ("prefill", "decode"):
        follow = f"kubectl logs -n dynamo-cloud -l app=multinode-vllm-{role} -f"
        shell.until(follow, f"multinode-vllm-{role}worker")
    frontend = "kubectl logs -n dynamo-cloud -l app=multinode-vllm-frontend -f"
    shell.until(rf'{frontend} | grep --line-buffered -i "routing\|overlap"', "routing decision: ")
    everywhere = "kubectl logs -n dynamo-cloud -l app=multinode-vllm -f"
    shell.until(rf'{everywhere} | grep --line-buffered -i "nixl\|transfer"', "KV transfer")

    # Scaling
    for role, command in PATCHES.items():
        shell(command if shell.reads_preferences else f"{command} --type merge")
        wait_ready(platform, **{role: {"prefill": "3/3", "decode": "4/4"}[role]})

    # Cleanup
    shell("kubectl delete dynamographdeployment multinode-vllm -n dynamo-cloud")
    wait_gone(platform)


def test_the_deployment_script_its_test_and_its_cleanup(platform: Kubectl) -> None:
    """`./deploy.sh multinode-vllm` with the operator there already; conftest.py has installed it by
    deploy.sh."""
    options = ["--engine", "reference", "--model", "/models/tiny"]
    told = script(platform, "./deploy.sh", "multinode-vllm", *options, PENSTOCK_IMAGE="")
    assert "READY: multinode-vllm in dynamo-cloud" in told
    assert "PASSED" in script(platform, "./test.sh", "multinode-vllm")
    script(platform, "./cleanup.sh", "--yes", "multinode-vllm")
    wait_gone(platform)
