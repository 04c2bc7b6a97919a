from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from penstock.discovery.kubernetes import KubernetesDiscovery, registration_of
from penstock.kubernetes.api import Object
from penstock.kubernetes.kinds import PODS
from penstock.shapes import Registration, Role
from tests.builders import registration
from tests.discovery.contract import DiscoveryContract, Watcher
from tests.discovery.pods import GRAPH, QUICK, PodMakingDiscovery, essence, pod, running, tell
from tests.kubernetes_double import KubernetesDouble
from tests.waiting import until

NS = "test"


@pytest.fixture
async def server() -> KubernetesDouble:
    return KubernetesDouble()


@pytest.fixture
async def opened(server: KubernetesDouble) -> AsyncIterator[Callable[[], PodMakingDiscovery]]:
    discoveries: list[PodMakingDiscovery] = []

    def open_one() -> PodMakingDiscovery:
        discoveries.append(PodMakingDiscovery(server, NS))
        return discoveries[-1]

    yield open_one
    for discovery in discoveries:
        await discovery.close()


class TestKubernetesDiscovery(DiscoveryContract):
    odd_id = "a.b-c"

    def essence(self, found: Registration) -> object:
        return essence(found)

    @pytest.fixture
    def open_discovery(self, opened: Callable[[], PodMakingDiscovery]) -> Callable[[], PodMakingDiscovery]:
        return opened


# --- what a pod says -----------------------------------------------------------------------------------


def seen_pod(**parts: Any) -> Object:
    found = {**pod(NS, "w-0", "decode", 7000), "status": running("10.0.0.7", started=1_700_000_000)}
    found["metadata"]["uid"] = "u"
    for path, value in parts.items():
        holder = found
        *way, last = path.split("__")
        for name in way:
            holder = holder[int(name) if name.isdigit() else name]
        holder[int(last) if last.isdigit() else last] = value
    return found


def test_a_pod_as_a_registration() -> None:
    assert registration_of(seen_pod(spec__nodeName="node1")) == Registration(
        instance_id="w-0",
        epoch=0,
        role=Role.DECODE,
        model="",
        address="10.0.0.7:7000",
        host="node1",
        process="u/0",
        started_ms=1_700_000_000_000,
    )


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"status__podIP": "fd00::7"}, "address", "[fd00::7]:7000"),
        ({"spec__containers__1__ports__0__containerPort": 7001}, "address", "10.0.0.7:7001"),
        ({"status__containerStatuses__0__restartCount": 3}, "process", "u/3"),
        ({"metadata__uid": "v"}, "process", "v/0"),
        ({"metadata__labels__role": "prefill"}, "role", Role.PREFILL),
        ({"status__containerStatuses__0__state__running__startedAt": "soon"}, "started_ms", 0),
        ({"status__containerStatuses__0__state__running": {}}, "started_ms", 0),
    ],
)
def test_what_it_says_in_other_cases(change: dict[str, Any], field: str, value: object) -> None:
    found = registration_of(seen_pod(**change))
    assert getattr(found, field) == value


@pytest.mark.parametrize(
    "change",
    [
        {"status": {}},
        {"status__phase": "Pending"},
        {"status__phase": "Failed"},
        {"status__podIP": ""},
        {"status__containerStatuses": None},
        {"status__containerStatuses__0__name": "other"},
        {"status__containerStatuses__0__state": {"waiting": {"reason": "CrashLoopBackOff"}}},
        {"status__containerStatuses__0__state": {"terminated": {"exitCode": 1}}},
        {"metadata__deletionTimestamp": "2026-01-01T00:00:00Z"},
        {"metadata__labels__role": "frontend"},
        {"metadata__labels": {}},
        {"spec__containers__1__ports": None},
        {"spec__containers__1__ports__0__name": "http"},
        {"spec__containers__1__name": "other"},
    ],
    ids=str,
)
def test_pods_that_nobody_connects_to(change: dict[str, Any]) -> None:
    assert registration_of(seen_pod(**change)) is None


# --- pods over time ---------------------------------------------------------------------------------------


async def test_the_life_of_a_pod(server: KubernetesDouble, opened: Any) -> None:
    async with Watcher(opened()) as watcher:
        await watcher.until()
        new = pod(NS, "w-0", "decode", 7000)
        new["spec"]["nodeName"] = "node1"
        await server.create(PODS, new)
        await tell(server, NS, "w-0", {"podIP": "10.0.0.7"})
        await asyncio.sleep(0.1)
        assert watcher.latest == {}
        await tell(server, NS, "w-0", running("10.0.0.7"))
        first = (await watcher.until("w-0"))["w-0"]
        waiting = {**running("10.0.0.7"), "containerStatuses": [{"name": "main", "state": {"waiting": {}}}]}
        await tell(server, NS, "w-0", waiting)
        await watcher.until()
        await tell(server, NS, "w-0", running("10.0.0.7", restarts=1))
        again = (await watcher.until("w-0"))["w-0"]
        assert again.process != first.process
        await server.delete(PODS, "w-0", NS)  # from now on it has its grace period
        await watcher.until()
        server.remove(PODS, "w-0", NS)
        await asyncio.sleep(0.1)
        assert watcher.latest == {}


async def test_what_does_not_matter_is_no_update(server: KubernetesDouble, opened: Any) -> None:
    await opened().register(registration())
    async with Watcher(opened()) as watcher:
        await watcher.until("w-0")
        await server.patch(PODS, "w-0", {"metadata": {"annotations": {"x": "1"}}}, NS)
        ready = {"conditions": [{"type": "Ready", "status": "True"}]}
        await tell(server, NS, "w-0", ready)
        await asyncio.sleep(0.2)
        assert watcher.updates == 1


async def test_graphs_and_namespaces_do_not_meet(server: KubernetesDouble, opened: Any) -> None:
    for namespace, graph in ((NS, "other"), ("elsewhere", GRAPH), (NS, GRAPH)):
        await server.create(PODS, pod(namespace, f"w-{graph}", "decode", 7000, graph))
        await tell(server, namespace, f"w-{graph}", running("10.0.0.7"))
    async with Watcher(opened()) as watcher:
        await watcher.until(f"w-{GRAPH}")


async def test_an_outage_of_the_api_server(
    server: KubernetesDouble, opened: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "penstock")
    leases = [await opened().register(registration(f"w-{number}")) for number in (0, 1)]
    async with Watcher(watching := opened()) as watcher:
        before = await watcher.until("w-0", "w-1")
        server.disconnect("connection refused")
        server.remove(PODS, "w-1", NS)
        await until(lambda: "connection refused" in watching.trouble)
        await asyncio.sleep(1)
        assert watcher.latest == before
        assert watcher.updates == 1
        server.connect()
        await watcher.until("w-0")
        await until(lambda: watching.trouble == "")
    assert "pods: the API server does not answer, the last known objects stay" in caplog.text
    assert "pods: the API server answers again: outage_s=" in caplog.text
    assert all(lease.registered and not lease.trouble for lease in leases)


async def test_a_worker_registers_without_an_api_server() -> None:
    discovery = KubernetesDiscovery(None, "", GRAPH, QUICK)
    lease = await discovery.register(registration())
    assert (lease.registered, lease.trouble) == (True, "")
    await lease.close()
    await discovery.close()
