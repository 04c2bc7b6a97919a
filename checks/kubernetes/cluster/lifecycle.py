"""Starting the cluster, ending it, and telling what is there."""

from __future__ import annotations

import json
import os
import shutil
import ssl
import sys
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from checks.kubernetes.cluster import (
    addons,
    binaries,
    boxes,
    cgroups,
    control,
    dns,
    images,
    keys,
    nodes,
    ownership,
    packages,
)
from checks.kubernetes.cluster.command import ClusterError, run, say, wait_until
from checks.kubernetes.cluster.ownership import Owner
from checks.kubernetes.cluster.places import (
    API,
    CONTROL,
    DNS_ADDRESS,
    KUBECONFIG,
    MAX_NODES,
    RUNTIME,
    STATE,
    node_name,
)

API_S = 90.0
NODES_S = 120.0
DNS_S = 60.0
LOADED = "loaded-images"


def check_machine() -> None:
    """Raises ClusterError where the cluster cannot run."""
    release = Path("/etc/os-release")
    known = release.read_text() if release.exists() else ""
    if "ID=debian\n" not in known or f"VERSION_CODENAME={packages.RELEASE}\n" not in known:
        raise ClusterError(
            f"the test cluster is built from Debian 12 ({packages.RELEASE}), and runs there only: "
            "elsewhere, set KUBECONFIG to a cluster of yours for `make test-kubernetes`"
        )
    if os.geteuid() != 0:
        raise ClusterError("the test cluster needs root: it makes namespaces, control groups and mounts")
    if not cgroups.supported():
        raise ClusterError(
            "the test cluster needs control groups of version 1: "
            "boot with systemd.unified_cgroup_hierarchy=0"
        )


def up(count: int) -> None:
    """Start a cluster of `count` nodes. If ours runs already, bring its Penstock image up to date."""
    check_machine()
    if not 1 <= count <= MAX_NODES:
        raise ClusterError(f"1 to {MAX_NODES} nodes, not {count}")
    with ownership.changing():
        found = running()
        if found is not None:
            if not found.is_us:
                raise ClusterError(found.refusal())
            if found.nodes != count:
                raise ClusterError(f"it runs with {found.nodes} nodes: `make cluster-down` first")
            load_images(count, images.build())
            say("it runs already, and has this checkout's image")
        else:
            clean_up()
            binaries.build()
            archive = images.build()
            ownership.write(count, complete=False)
            try:
                start(count, archive)
            except ClusterError as error:
                raise ClusterError(f"{error}; its logs are in {STATE / 'logs'}") from error
            ownership.write(count, complete=True)
    print(f"export KUBECONFIG={KUBECONFIG}", flush=True)


def running() -> Owner | None:
    """Whose cluster runs on this machine: complete, and not killed since."""
    found = ownership.owner()
    alive = found is not None and found.complete and boxes.first_process(CONTROL) is not None
    return found if alive else None


def start(count: int, archive: Path) -> None:
    started = time.monotonic()
    names = {node_name(number) for number in range(1, count + 1)}

    def reached(what: str) -> None:
        say(f"{what} after {time.monotonic() - started:.1f} s")

    if not Path("/proc/sys/net/bridge").exists():
        run("modprobe", "br_netfilter")  # pods on one node reach each other's services through it
    STATE.mkdir(parents=True)
    keys.make(count)
    control.start()
    for number in range(1, count + 1):
        nodes.start(number)
    load_images(count, archive)
    reached("nodes have their images")
    wait_until(api_ready, "the API server is ready", API_S)
    apply(addons.dns_objects(replicas=min(count, 2)))
    wait_until(lambda: ready_nodes() == names, "all nodes are Ready", NODES_S)
    reached("nodes are Ready")
    for number in range(1, count + 1):
        wait_until(partial(dns_answers, number), f"DNS answers on {node_name(number)}", DNS_S)
    reached("DNS answers")


def apply(objects: Sequence[dict[str, Any]]) -> None:
    kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))


def load_images(count: int, archive: Path) -> None:
    """Give the images to every node that is on and does not have them."""

    def load(number: int) -> None:
        note = boxes.disk(node_name(number)) / LOADED
        is_off = boxes.first_process(node_name(number)) is None
        if is_off or (note.exists() and note.read_text() == archive.name):
            return
        nodes.load(number, archive)
        note.write_text(archive.name)

    with ThreadPoolExecutor() as pool:
        list(pool.map(load, range(1, count + 1)))


def kubectl(*arguments: str, stdin: str | None = None, check: bool = True) -> str:
    program = binaries.kubernetes("kubectl")
    return run(program, "--kubeconfig", KUBECONFIG, *arguments, stdin=stdin, check=check).stdout


def api_ready() -> bool:
    return kubectl("get", "--raw", "/readyz", "--request-timeout=2s", check=False) == "ok"


def ready_nodes() -> set[str]:
    found = json.loads(kubectl("get", "nodes", "-o", "json", check=False) or '{"items": []}')
    return {
        node["metadata"]["name"]
        for node in found["items"]
        for condition in node["status"]["conditions"]
        if condition["type"] == "Ready" and condition["status"] == "True"
    }


def dns_answers(number: int) -> bool:
    """Whether DNS knows the API server's service, asked as pods of this node ask."""
    question = ("ask", DNS_ADDRESS, "53", "kubernetes.default.svc.cluster.local")
    done = boxes.inside(node_name(number), sys.executable, "-I", dns.__file__, *question, check=False)
    return done.returncode == 0 and bool(done.stdout.strip())


def down() -> None:
    """End the cluster of this machine, whoever started it, complete or not, and leave nothing of it."""
    check_machine()
    with ownership.changing():
        clean_up()
        shutil.rmtree(RUNTIME)


def clean_up() -> None:
    """Take away what runs, or what a killed run left."""
    found = ownership.owner()
    for box in sorted(cgroups.boxes(), key=lambda box: box == CONTROL):  # the switch last
        boxes.stop(box)
    cgroups.remove_top()
    for state in {STATE, Path(found.state) if found is not None else STATE}:
        if state.exists():
            shutil.rmtree(state)
    ownership.NOTE.unlink(missing_ok=True)


def start_node(box: str) -> None:
    """Switch a node on again."""
    if boxes.first_process(box) is not None:
        raise ClusterError(f"{box} runs already")
    if not boxes.disk(box).exists():
        raise ClusterError(f"{box} is not of this cluster: `status` shows what is")
    nodes.start(nodes.number_of(box))


def gpus(box: str, count: int) -> None:
    """Let a node claim GPUs that it does not have. Its kubelet takes them up within 10 s."""
    boxes.running(box)
    patch = [{"op": "add", "path": "/status/capacity/nvidia.com~1gpu", "value": str(count)}]
    # kubectl of this version cannot write a status.
    context = ssl.create_default_context(cafile=str(keys.FOLDER / "ca.crt"))
    context.load_cert_chain(keys.FOLDER / "admin.crt", keys.FOLDER / "admin.key")
    request = urllib.request.Request(
        f"{API}/api/v1/nodes/{box}/status",
        method="PATCH",
        data=json.dumps(patch).encode(),
        headers={"Content-Type": "application/json-patch+json"},
    )
    with urllib.request.urlopen(request, timeout=10, context=context):
        pass


def status() -> Sequence[str]:
    """Lines that tell what there is."""
    found = running()
    names = cgroups.boxes()
    if not names:
        return ["no cluster runs on this machine"]
    lines = [
        f"of {found.checkout}, since {found.since}" if found else "not complete: it starts, or was killed"
    ]
    for box in names:
        if boxes.first_process(box) is None:
            state = "off"
        elif boxes.frozen(box):
            state = "frozen"
        else:
            state = ", ".join(sorted({boxes.program(pid) for pid in cgroups.own_processes(box)}))
        lines.append(f"{box}: {state}")
    if found:
        lines.append(f"export KUBECONFIG={found.kubeconfig}")
    return lines
