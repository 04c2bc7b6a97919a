"""`penstock log-relay` on the logs of real containers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from checks.kubernetes.graphs import Images
from checks.kubernetes.kubectl import Kubectl, eventually
from checks.kubernetes.pods import named_pod, pod

ROOT = Path(__file__).parents[2]
START_S = 60.0
MEMORY_MAX_KIB = 60 * 1024

# Counts, five lines a second, until it is told to end; a burst of lines comes in the same moment.
COUNT = "trap 'exit 0' TERM; echo start; i=0; while :; do i=$((i+1)); echo line $i; sleep 0.2; done"


class Relay:
    """The command, and what it has printed."""

    def __init__(self, kubectl: Kubectl, folder: Path) -> None:
        self.file = folder / "relay.log"
        options = "--graph", "g", "--role", "prefill", "--kubernetes-namespace", kubectl.namespace
        with self.file.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "penstock", "log-relay", *options],
                env={**os.environ, "KUBECONFIG": kubectl.kubeconfig},
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            )

    def lines(self, name: str) -> list[str]:
        prefix = f"{name} | "
        lines = self.file.read_text().splitlines()
        return [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]

    def memory_kib(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


@pytest.fixture
def counting(images: Images) -> dict[str, Any]:
    """A pod of graph g, role prefill, that counts; not started yet."""
    found = named_pod("w-0", pod(images.penstock, ["sh", "-c", COUNT]))
    found["metadata"]["labels"] |= {"penstock.dev/graph": "g", "role": "prefill"}
    return found


def test_each_line_comes_once(kubectl: Kubectl, counting: dict[str, Any], tmp_path: Path) -> None:
    relay = Relay(kubectl, tmp_path)
    try:
        kubectl.apply(counting)
        eventually(lambda: len(relay.lines("w-0")) > 10, "lines come", START_S)
        assert relay.lines("w-0")[:2] == ["start", "line 1"]  # the pod is newer than the relay

        kubectl("exec", "w-0", "--", "sh", "-c", "kill 1")  # the container ends, and is started again
        eventually(lambda: relay.lines("w-0").count("start") == 2, "the next container's lines", START_S)
        lines = relay.lines("w-0")
        second = lines.index("start", 1)
        for run in (lines[1:second], lines[second + 1 :]):
            assert run == [f"line {number}" for number in range(1, len(run) + 1)]

        kubectl("delete", "pod", "w-0", "--wait=true")
        kubectl.apply(counting)
        eventually(lambda: relay.lines("w-0").count("start") == 3, "the next pod's lines", START_S)
        assert relay.memory_kib() < MEMORY_MAX_KIB
        relay.process.send_signal(signal.SIGTERM)
        assert relay.process.wait(timeout=START_S) == 0
    finally:
        relay.process.kill()
        relay.process.wait()
        print(relay.file.read_text()[-2000:])


def test_a_pod_of_before_is_shown_from_its_last_lines(
    kubectl: Kubectl, counting: dict[str, Any], tmp_path: Path
) -> None:
    kubectl.apply(counting)
    kubectl.wait("--for=condition=Ready", "pod/w-0")
    eventually(lambda: kubectl("logs", "w-0").count("line ") >= 20, "it counts", START_S)
    relay = Relay(kubectl, tmp_path)
    try:
        eventually(lambda: len(relay.lines("w-0")) > 12, "lines come", START_S)
        numbers = [int(line.removeprefix("line ")) for line in relay.lines("w-0")]
        assert numbers[0] > 5
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    finally:
        relay.process.kill()
        relay.process.wait()
