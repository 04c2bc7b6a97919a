"""What can happen to nodes of the project's own cluster. Each lasts as long as the `with` block."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

from checks.kubernetes.cluster import boxes, cgroups, lifecycle, nodes
from checks.kubernetes.kubectl import Kubectl


@contextlib.contextmanager
def frozen(node: str) -> Iterator[None]:
    """All that runs on the node stands still: kubelet, containerd, pods."""
    cgroups.freeze(node)
    try:
        yield
    finally:
        cgroups.thaw(node)


@contextlib.contextmanager
def cut_off(node: str) -> Iterator[None]:
    """Its network cable is out."""
    boxes.cut(node)
    try:
        yield
    finally:
        boxes.join(node)


@contextlib.contextmanager
def powered_off(node: str) -> Iterator[None]:
    """Its power cord is out. Afterwards it starts with the disk that it had."""
    boxes.stop(node)
    try:
        yield
    finally:
        lifecycle.start_node(node)


@contextlib.contextmanager
def halted(box: str, process: str) -> Iterator[None]:
    """One service stands still: kubelet, containerd, kube-apiserver, ..."""
    boxes.signal_process(box, process, signal.SIGSTOP)
    try:
        yield
    finally:
        boxes.signal_process(box, process, signal.SIGCONT)


def kill(box: str, process: str) -> None:
    """One service is killed. It is started again a second later."""
    boxes.signal_process(box, process, signal.SIGKILL)


def kill_container(kubectl: Kubectl, pod: str) -> None:
    """Kill the first process of a pod's first container. kubectl cannot: `exec kill -9 1` does nothing.

    The kernel protects the first process of a process namespace from the others in it.
    """
    found = kubectl.get("pod", pod)
    [status, *_] = found["status"]["containerStatuses"]
    container = status["containerID"].removeprefix("containerd://")
    number = nodes.number_of(found["spec"]["nodeName"])
    nodes.containerd(number, "tasks", "kill", "--signal", "SIGKILL", container)
