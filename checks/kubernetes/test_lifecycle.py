"""Starting and ending the cluster: nothing is left behind, and what a killed run left does not matter."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from checks.kubernetes.cluster import binaries, boxes, cgroups, lifecycle, places
from checks.kubernetes.cluster.places import CONTROL
from checks.kubernetes.conftest import NODES, cluster_command
from checks.kubernetes.graphs import Images
from checks.kubernetes.kubectl import Kubectl, eventually
from checks.kubernetes.pods import PORT, SERVE, named_pod, pod, service

# Of what the kernel counts, and of what changes by itself.
RESTLESS = re.compile(
    r"^(fs\.(file-nr|inode-|dentry-|quota|aio-nr)|kernel\.(random|ns_last_pid|pty\.nr)|.*\.free)"
)
# Started for the cluster. What others run on this machine, as the etcd of other tests, may come and go.
OURS = re.compile(
    r"kube-?(let|proxy|apiserver|scheduler|controller)|containerd|(?<!etcdbin)/etcd|/pause|cluster/init\.py"
)


# The kernel takes namespaces apart a moment after the last process in them has ended.
KERNEL_S = 60.0


def output(*command: str) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def settings() -> dict[str, str]:
    found = {}
    for path in Path("/proc/sys").rglob("*"):
        name = ".".join(path.relative_to("/proc/sys").parts)
        if path.is_file() and os.access(path, os.R_OK) and not RESTLESS.match(name):
            try:
                found[name] = path.read_text(errors="replace")
            except OSError:
                continue  # some can only be written
    return found


def processes() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if OURS.search(command):
            found.append(command)
    return found


def machine() -> dict[str, object]:
    """All that the cluster changes about this machine while it runs."""
    return {
        "links": [re.sub(r" state .*", "", line) for line in output("ip", "-oneline", "link")],
        "addresses": output("ip", "-oneline", "address"),
        "routes": output("ip", "route", "show", "table", "all"),
        "mounts": Path("/proc/mounts").read_text().splitlines(),
        "control groups": sorted(str(path) for path in cgroups.ROOT.rglob("*/")),
        "packet filter": [
            line
            for line in output("iptables-save") + output("ip6tables-save")
            if not line.startswith(("#", ":"))
        ],
        "settings": settings(),
        "namespaces": sorted(output("lsns", "--noheadings", "--output", "NS")),
        "processes": processes(),
        "files": [str(path) for path in (places.STATE, places.RUNTIME) if path.exists()],
        "etc": sorted(str(path) for path in Path("/etc/cni").rglob("*")),
        "var": sorted(str(path) for path in Path("/var/lib").glob("*")),
        "run": sorted(str(path) for path in Path("/run").glob("*")),
    }


def cluster(*arguments: str, cwd: Path = places.CHECKOUT, before: Sequence[str] = ()) -> str:
    """A command that succeeds; what it printed."""
    done = refused(*arguments, cwd=cwd, before=before)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(
    *arguments: str, cwd: Path = places.CHECKOUT, before: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*before, *cluster_command(*arguments)], cwd=cwd, capture_output=True, text=True, check=False
    )


def kill_while_it_starts(process: subprocess.Popen[bytes]) -> None:
    """Kill a start once its nodes are there, but not yet ready."""
    eventually(
        lambda: boxes.first_process(CONTROL) and boxes.first_process("node1"), "a box of a node", 120
    )
    time.sleep(2)
    process.kill()
    process.wait()


@pytest.mark.no_cluster_before
def test_it_starts_over_what_a_killed_start_left_and_ends_without_a_trace(
    tmp_path: Path, images: Images
) -> None:
    cluster("build")
    cluster("down")
    before = machine()
    with subprocess.Popen(cluster_command("up"), cwd=places.CHECKOUT, stdout=subprocess.DEVNULL) as start:
        kill_while_it_starts(start)
    killed = machine()
    assert killed["processes"] != before["processes"]
    assert "not complete" in cluster("status")

    cluster("up", "--nodes", str(NODES))
    kubectl = Kubectl(binaries.kubernetes("kubectl"), str(places.KUBECONFIG), tmp_path)
    serving = pod(images.penstock, SERVE, "node1", ports=[{"containerPort": PORT, "hostPort": 30080}])
    kubectl.apply(named_pod("server", serving), service("server", type="NodePort"))
    kubectl.wait("--for=condition=Ready", "pod/server")
    cgroups.freeze("node2")
    cluster("down")
    deadline = time.monotonic() + KERNEL_S
    while (left := machine()) != before and time.monotonic() < deadline:
        time.sleep(0.2)
    for what, value in before.items():
        assert left[what] == value, what


@pytest.mark.no_cluster_before
def test_it_starts_over_a_cluster_whose_processes_were_killed() -> None:
    cluster("up", "--nodes", "1")
    for box in cgroups.boxes():
        first = boxes.first_process(box)
        assert first is not None
        os.kill(first, signal.SIGKILL)
    eventually(lambda: lifecycle.running() is None, "the control plane is gone", KERNEL_S)
    assert "export KUBECONFIG" in cluster("up", "--nodes", "1")
    assert lifecycle.ready_nodes() == {"node1"}
    cluster("down")


@pytest.mark.own_cluster
@pytest.mark.usefixtures("cluster")
def test_a_second_cluster_says_who_has_the_first(tmp_path: Path) -> None:
    other = tmp_path / "checkout"
    shutil.copytree(places.CHECKOUT / "checks/kubernetes/cluster", other / "checks/kubernetes/cluster")
    done = refused("up", cwd=other)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: the cluster of {places.CHECKOUT} runs on this machine since ")
    assert done.stderr.count("\n") == 1


@pytest.mark.own_cluster
@pytest.mark.usefixtures("cluster")
def test_a_second_start_from_the_same_checkout_finds_it_running() -> None:
    assert f"export KUBECONFIG={places.KUBECONFIG}" in cluster("up", "--nodes", str(NODES))
    done = refused("up", "--nodes", str(NODES + 1))
    assert done.returncode == 1
    assert done.stderr == f"error: it runs with {NODES} nodes: `make cluster-down` first\n"


@pytest.mark.own_cluster
@pytest.mark.parametrize(
    ("before", "told"),
    [
        (["unshare", "--user"], "error: the test cluster needs root"),
        (
            ["unshare", "--mount", "sh", "-c", 'mount --bind /dev/null /etc/os-release && exec "$@"', "sh"],
            "error: the test cluster is built from Debian 12",
        ),
        (
            ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /sys/fs/cgroup && exec "$@"', "sh"],
            "error: the test cluster needs control groups of version 1",
        ),
    ],
    ids=["without root", "not Debian", "other control groups"],
)
@pytest.mark.parametrize("command", [["up"], ["build"], ["down"]], ids=" ".join)
def test_a_machine_that_cannot_run_it_is_told_in_one_line(
    before: list[str], told: str, command: list[str]
) -> None:
    done = refused(*command, before=before)
    assert done.returncode == 1
    assert done.stderr.startswith(told)
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.own_cluster
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["node", "freeze", "7"], "error: node7 is not running: `status` shows what is"),
        (["node", "start", "7"], "error: node7 is not of this cluster: `status` shows what is"),
        (["node", "start", "1"], "error: node1 runs already"),
        (["node", "cut", "control"], "error: the control plane takes freeze, thaw, kill-process"),
        (["node", "cut", "frontend"], "error: 'frontend' is no node: say 1 or node1"),
        (["node", "kill-process", "1", "kubeletto"], "error: no process kubeletto in node1; there are"),
        (["gpus", "7", "1"], "error: node7 is not running: `status` shows what is"),
        (["up", "--nodes", "0"], "error: 1 to 9 nodes, not 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_told_in_one_line(arguments: list[str], told: str) -> None:
    done = refused(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(told)
    assert done.stderr.count("\n") == 1
