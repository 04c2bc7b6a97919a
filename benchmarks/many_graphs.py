"""The operator with many graphs: how long they take, what it costs, and that it then does nothing.

    python -m benchmarks.many_graphs [--graphs 200] [--idle-s 60]

Starts a control plane of its own without nodes (control_plane.py) and a `penstock operator`, applies graphs
of three services and no replicas, and measures from the first apply until all of them are successful; then
an idle while; then a restart of the operator; then one graph that is scaled. Memory is PSS, the peak of
looks every 0.2 s.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import yaml

from benchmarks.control_plane import ControlPlane, control_plane, free_ports
from penstock.kubernetes.api import ApiError, Object, name_of
from penstock.kubernetes.client import HttpsApi, connect
from penstock.kubernetes.kinds import DEFINITIONS, DEPLOYMENTS, GRAPHS, LEASES

ROOT = Path(__file__).parent.parent
NAMESPACE = "default"
APPLIED_AT_ONCE = 4
TIMEOUT_S = 300.0
QUIET_S = 3.0
LOOK_S = 0.2
SCALED = 20
_TICKS = os.sysconf("SC_CLK_TCK")


class Operator:
    """A running `penstock operator`."""

    def __init__(self, plane: ControlPlane) -> None:
        log = (plane.folder / "operator.log").open("ab")
        flags = ["--kubeconfig", plane.kubeconfig("operator"), "--lease-namespace", NAMESPACE]
        flags += ["--system-port", str(free_ports(1)[0]), "--image", "penstock:bench"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "penstock", "operator", *flags], stdout=log, stderr=log, cwd=ROOT
        )
        self.peak_mib = 0.0

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def memory_mib(self) -> float:
        for line in Path(f"/proc/{self.process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
        return 0.0

    async def watch_memory(self) -> None:
        while self.process.poll() is None:
            with contextlib.suppress(OSError):  # it has just ended
                self.peak_mib = max(self.peak_mib, self.memory_mib())
            await asyncio.sleep(LOOK_S)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=30)


@contextlib.asynccontextmanager
async def running(plane: ControlPlane) -> AsyncIterator[Operator]:
    operator = Operator(plane)
    watching = asyncio.create_task(operator.watch_memory())
    try:
        yield operator
    finally:
        operator.stop()
        watching.cancel()


def manifest(number: int) -> Object:
    """The shipped graph, with no replicas and without log relays."""
    graph: Object = copy.deepcopy(_SHIPPED)
    graph["metadata"] = {"name": f"graph-{number:04}", "namespace": NAMESPACE}
    for service in graph["spec"]["services"].values():
        service["replicas"] = 0
    return graph


_SHIPPED: dict[str, Any] = yaml.safe_load((ROOT / "deploy/multinode-vllm.yaml").read_text())


async def install_definitions(api: HttpsApi) -> None:
    for path in sorted((ROOT / "deploy/crds").glob("nvidia.com_*.yaml")):
        await api.apply(DEFINITIONS, yaml.safe_load(path.read_text()), "bench")
    await until(lambda: api.serves(GRAPHS))


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            if await holds():
                return
            await asyncio.sleep(0.1)


async def apply_all(api: HttpsApi, count: int) -> None:
    places = asyncio.Semaphore(APPLIED_AT_ONCE)

    async def apply(number: int) -> None:
        async with places:
            await api.apply(GRAPHS, manifest(number), "kubectl")

    await asyncio.gather(*(apply(number) for number in range(count)))


async def all_successful(api: HttpsApi, count: int) -> None:
    """Wait for that, by a watch, which costs the API server less than asking again and again."""
    states: dict[str, str] = {}
    listed = await api.list(GRAPHS, NAMESPACE)
    for graph in listed.items:
        states[name_of(graph)] = _state(graph)
    watching = api.watch(GRAPHS, listed.resource_version, NAMESPACE)
    async with asyncio.timeout(TIMEOUT_S), contextlib.aclosing(watching):
        while list(states.values()).count("successful") < count:
            change = await anext(watching)
            if change.type != "BOOKMARK":
                states[name_of(change.object)] = _state(change.object)


def _state(graph: Object) -> str:
    return str((graph.get("status") or {}).get("state", ""))


async def quiet(plane: ControlPlane) -> float:
    """Wait until the operator has written nothing for QUIET_S; when it wrote last."""
    last, place = time.monotonic(), -1
    while time.monotonic() - last < QUIET_S:
        await asyncio.sleep(0.1)
        if (now := plane.now()) != place and plane.writes(max(place, 0)):
            last = time.monotonic()
        place = now
    return last


def told(counts: dict[str, int]) -> str:
    return ", ".join(f"{what} {count}" for what, count in sorted(counts.items())) or "none"


async def measure(plane: ControlPlane, count: int, idle_s: float) -> None:
    api = connect(plane.kubeconfig("admin"))
    await install_definitions(api)
    async with running(plane) as operator:
        await until(lambda: _leads(api))
        await asyncio.sleep(2.0)
        print(f"before: {operator.memory_mib():.0f} MiB, {operator.cpu_s():.2f} s of CPU since its start")
        began, cpu_s = time.monotonic(), operator.cpu_s()
        await asyncio.gather(apply_all(api, count), all_successful(api, count))
        took_s = time.monotonic() - began
        print(f"{count} graphs successful: {took_s:.1f} s, {operator.cpu_s() - cpu_s:.1f} s of CPU")
        last = await quiet(plane)
        print(f"quiet after {last - began:.1f} s; writes: {told(plane.writes())}")
        await until(lambda: _all_seen(api))
        print(f"the controller manager is done after {time.monotonic() - began:.1f} s")
        print(f"memory: {operator.peak_mib:.0f} MiB at most, {operator.memory_mib():.0f} MiB now")
        place, cpu_s = plane.now(), operator.cpu_s()
        await asyncio.sleep(idle_s)
        share = (operator.cpu_s() - cpu_s) / idle_s
        print(f"idle for {idle_s:.0f} s: {share:.2%} of a core; writes: {told(plane.writes(place))}")
    place, began = plane.now(), time.monotonic()
    async with running(plane) as operator:
        await until(lambda: _leads(api))
        last = await quiet(plane)
        print(f"restarted: quiet after {last - began:.1f} s, {operator.cpu_s():.1f} s of CPU")
        print(f"memory: {operator.peak_mib:.0f} MiB at most; writes: {told(plane.writes(place))}")
        waits_s = sorted([await scaled(api, number % count, 1) for number in range(SCALED)])
        middle, most = 1e3 * waits_s[SCALED // 2], 1e3 * waits_s[-1]
        print(f"from a graph's patch to its Deployment: {middle:.0f} ms, {most:.0f} at most of {SCALED}")
    await api.close()


async def _all_seen(api: HttpsApi) -> bool:
    """Whether the controller manager has looked at each Deployment: it allows itself 20 calls a second, and
    until it is done there are changes."""
    await asyncio.sleep(2.0)
    return all(
        (item.get("status") or {}).get("observedGeneration") for item in (await api.list(DEPLOYMENTS)).items
    )


async def _leads(api: HttpsApi) -> bool:
    """Whether an operator holds the lease; one that ends gives it back."""
    try:
        return bool((await api.get(LEASES, "penstock-operator", NAMESPACE))["spec"].get("holderIdentity"))
    except ApiError:
        return False


async def scaled(api: HttpsApi, number: int, replicas: int) -> float:
    """Seconds until the Deployment of a service has the replicas that its graph was patched to."""
    name = f"graph-{number:04}"
    labels = f"nvidia.com/dynamo-graph-deployment-name={name}"
    listed = await api.list(DEPLOYMENTS, NAMESPACE, labels)
    watching = api.watch(DEPLOYMENTS, listed.resource_version, NAMESPACE, labels)
    async with asyncio.timeout(TIMEOUT_S), contextlib.aclosing(watching):
        began = time.monotonic()
        change = {"spec": {"services": {"PrefillWorker": {"replicas": replicas}}}}
        await api.patch(GRAPHS, name, change, NAMESPACE)
        async for seen in watching:
            if seen.type != "BOOKMARK" and seen.object["spec"].get("replicas") == replicas:
                break
        return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--graphs", type=int, default=200)
    parser.add_argument("--idle-s", type=float, default=60.0)
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="penstock-many-graphs-") as folder,
        control_plane(Path(folder)) as plane,
    ):
        asyncio.run(measure(plane, given.graphs, given.idle_s))


if __name__ == "__main__":
    main()
