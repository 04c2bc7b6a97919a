"""The operator's loop on an API server in memory: graphs applied, followed, repaired, and told of."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from penstock.clock import MonotonicClock
from penstock.kubernetes.api import ApiError, Kind, Object, name_of
from penstock.kubernetes.kinds import (
    ADAPTERS,
    DEPLOYMENTS,
    EVENTS,
    GRAPHS,
    PODS,
    SECRETS,
    SERVICES,
    VOLUME_CLAIMS,
)
from penstock.operator.controller import Controller, ControllerSettings
from penstock.operator.metrics import OperatorMetrics
from penstock.operator.owned import MENDS_MAX
from penstock.operator.reconciler import keep_status_writers, other_operator
from penstock.operator.settings import RenderSettings
from tests.kubernetes_double import KubernetesDouble
from tests.waiting import until

NAMESPACE = "ns"
DEPLOYMENT_NAMES = ("g-decodeworker", "g-frontend", "g-prefillworker")


def graph(**services: Any) -> Object:
    """A small graph; a service that is None is left out."""
    command = ["penstock", "worker", "--model", "/models/tiny"]

    def worker(role: str, replicas: int) -> Object:
        container = {"image": "penstock:1", "command": command, "args": ["--role", role]}
        return {
            "componentType": "worker",
            "replicas": replicas,
            "extraPodSpec": {"mainContainer": container},
        }

    frontend = {
        "componentType": "frontend",
        "replicas": 1,
        "extraPodSpec": {"mainContainer": {"image": "penstock:1", "command": ["penstock", "frontend"]}},
    }
    all_services = {
        "Frontend": frontend,
        "PrefillWorker": worker("prefill", 2),
        "DecodeWorker": worker("decode", 2),
        **services,
    }
    return {
        "apiVersion": GRAPHS.api_version,
        "kind": GRAPHS.name,
        "metadata": {"name": "g", "namespace": NAMESPACE},
        "spec": {"services": {name: spec for name, spec in all_services.items() if spec is not None}},
    }


class Cluster:
    """An API server, and what its controllers would do where a test wants it."""

    def __init__(self) -> None:
        self.api = KubernetesDouble()
        self.now = datetime.now(UTC)
        self.leads = True

    @asynccontextmanager
    async def operator(self, namespace: str = "") -> AsyncIterator[Controller]:
        def new() -> Controller:
            return Controller(
                self.api,
                ControllerSettings(namespace=namespace),
                RenderSettings(image="penstock:operator"),
                OperatorMetrics(),
                MonotonicClock(),
                "test-host",
                leads=lambda: self.leads,
                utc=lambda: self.now,
            )

        async def work(controller: Controller) -> None:
            while True:
                await controller.run()
                controller = new()

        controller = new()
        running = asyncio.create_task(work(controller))
        try:
            yield controller
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def put(self, item: Object) -> Object:
        return await self.api.apply(GRAPHS, item, "kubectl")

    async def change(self, **spec: Any) -> None:
        await self.api.patch(GRAPHS, "g", {"spec": spec}, NAMESPACE)

    def get(self, kind: Kind, name: str) -> Object | None:
        return self.api.stored(kind, name, NAMESPACE)

    def status(self) -> Object:
        found = self.get(GRAPHS, "g")
        return (found or {}).get("status") or {}

    def condition(self, kind: str) -> Object:
        return next((one for one in self.status().get("conditions", ()) if one["type"] == kind), {})

    def deployments(self) -> set[str]:
        names = {f"g-{name}" for name in ("decodeworker", "frontend", "prefillworker")}
        return {name for name in names if self.get(DEPLOYMENTS, name) is not None}

    async def make_ready(self) -> None:
        """As the Deployment controller tells of it."""
        for name in self.deployments():
            found = self.get(DEPLOYMENTS, name)
            assert found is not None
            count = found["spec"]["replicas"]
            status = {
                "observedGeneration": found["metadata"]["generation"],
                **dict.fromkeys(
                    ("replicas", "updatedReplicas", "readyReplicas", "availableReplicas"), count
                ),
            }
            await self.api.patch(DEPLOYMENTS, name, {"status": status}, NAMESPACE, subresource="status")

    async def put_ready(self) -> None:
        """A graph whose status says that it is ready."""
        await self.put(graph())
        await until(lambda: len(self.deployments()) == 3)
        await self.make_ready()
        await until(lambda: self.status().get("state") == "successful")

    async def events(self) -> list[tuple[str, str]]:
        return [(item["reason"], item["message"]) for item in (await self.api.list(EVENTS)).items]

    async def settled(self, for_s: float = 0.6) -> int:
        """How many writes there have been, once there are none for a while."""
        while True:
            before = len(self.api.writes)
            await asyncio.sleep(for_s)
            if len(self.api.writes) == before:
                return before


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


async def test_a_graph_becomes_its_objects_and_tells_when_it_is_ready(cluster: Cluster) -> None:
    async with cluster.operator():
        await cluster.put(graph())
        await until(lambda: cluster.status().get("state") == "pending")
        assert cluster.deployments() == set(DEPLOYMENT_NAMES)
        assert cluster.get(SERVICES, "g-frontend") is not None
        assert cluster.status()["ready"] == {"frontend": "0/1", "prefill": "0/2", "decode": "0/2"}
        owner = cluster.get(DEPLOYMENTS, "g-frontend")["metadata"]["ownerReferences"][0]
        assert (owner["uid"], owner["controller"]) == (cluster.get(GRAPHS, "g")["metadata"]["uid"], True)
        await cluster.make_ready()
        await until(lambda: cluster.status()["state"] == "successful")
        assert cluster.status()["ready"] == {"frontend": "1/1", "prefill": "2/2", "decode": "2/2"}
        assert cluster.condition("Ready")["status"] == "True"
        await cluster.settled()
        reasons = [reason for reason, _ in await cluster.events()]
        assert reasons.count("Created") == 1
        assert reasons.count("Ready") == 1


async def test_a_graph_is_not_ready_between_its_restart_and_what_its_deployments_tell_of_it(
    cluster: Cluster,
) -> None:
    """When new Deployments are applied, the operator's cache still has the old ones, which were ready."""
    async with cluster.operator():
        await cluster.put_ready()
        await cluster.change(restart={"id": "again"})
        generation = cluster.get(GRAPHS, "g")["metadata"]["generation"]
        async with asyncio.timeout(10):
            while cluster.status()["observedGeneration"] != generation:
                await asyncio.sleep(0)
        assert cluster.status()["state"] == "pending"
        await cluster.make_ready()
        await until(lambda: cluster.status()["state"] == "successful")


async def test_an_operator_with_nothing_to_do_writes_nothing_also_after_its_restart(
    cluster: Cluster,
) -> None:
    async with cluster.operator():
        await cluster.put_ready()
        before = await cluster.settled()
    async with cluster.operator():
        assert await cluster.settled() == before


async def test_a_changed_replica_count_reaches_its_deployment_alone(cluster: Cluster) -> None:
    async with cluster.operator():
        await cluster.put(graph())
        await until(lambda: len(cluster.deployments()) == 3)
        await cluster.settled()
        others = [cluster.get(DEPLOYMENTS, name)["metadata"]["generation"] for name in DEPLOYMENT_NAMES[:2]]
        await cluster.change(services={"PrefillWorker": {"replicas": 5}})
        await until(lambda: cluster.get(DEPLOYMENTS, "g-prefillworker")["spec"]["replicas"] == 5)
        await cluster.settled()
        assert others == [
            cluster.get(DEPLOYMENTS, name)["metadata"]["generation"] for name in DEPLOYMENT_NAMES[:2]
        ]


async def test_what_is_wrong_in_a_manifest_is_told_and_nothing_that_runs_is_touched(
    cluster: Cluster,
) -> None:
    async with cluster.operator():
        await cluster.put(graph())
        await until(lambda: len(cluster.deployments()) == 3)
        await cluster.settled()
        running = {name: cluster.get(DEPLOYMENTS, name) for name in DEPLOYMENT_NAMES}
        bad = {"extraPodSpec": {"mainContainer": {"args": ["--role", "decode", "--bolck-size", "16"]}}}
        await cluster.change(services={"DecodeWorker": bad})
        await until(lambda: cluster.status().get("state") == "failed")
        ready = cluster.condition("Ready")
        assert (ready["status"], ready["reason"]) == ("False", "manifest_is_invalid")
        assert "spec.services.DecodeWorker" in ready["message"]
        assert "--block-size" in ready["message"]  # the hint
        assert cluster.status()["observedGeneration"] == cluster.get(GRAPHS, "g")["metadata"]["generation"]
        assert running == {name: cluster.get(DEPLOYMENTS, name) for name in DEPLOYMENT_NAMES}
        assert "ManifestInvalid" in dict(await cluster.events())
        good = {"extraPodSpec": {"mainContainer": {"args": ["--role", "decode", "--block-size", "32"]}}}
        await cluster.change(services={"DecodeWorker": good})
        await until(lambda: cluster.status().get("state") == "pending")


async def test_a_service_that_is_taken_out_is_deleted_and_its_volume_stays(cluster: Cluster) -> None:
    first = graph()
    first["spec"]["pvcs"] = [
        {
            "name": "weights",
            "create": True,
            "size": "1Gi",
            "storageClass": "s",
            "volumeAccessMode": "ReadWriteOnce",
        }
    ]
    async with cluster.operator():
        await cluster.put(first)
        await until(lambda: len(cluster.deployments()) == 3 and cluster.get(VOLUME_CLAIMS, "weights"))
        await cluster.settled()
        await cluster.put(graph(PrefillWorker=None))
        await until(lambda: cluster.deployments() == {"g-decodeworker", "g-frontend"})
        await cluster.settled()
        assert cluster.get(VOLUME_CLAIMS, "weights") is not None
        assert "prefill" not in cluster.status()["ready"]


async def test_deletion_leaves_nothing(cluster: Cluster) -> None:
    async with cluster.operator():
        await cluster.put(graph())
        await until(lambda: len(cluster.deployments()) == 3)
        await cluster.settled()
        await cluster.api.delete(GRAPHS, "g", NAMESPACE)
        await cluster.settled()
        for kind in (GRAPHS, DEPLOYMENTS, SERVICES, SECRETS):
            assert (await cluster.api.list(kind)).items == []


async def test_what_somebody_else_changes_or_deletes_is_mended(cluster: Cluster) -> None:
    async with cluster.operator():
        await cluster.put(graph())
        await until(lambda: len(cluster.deployments()) == 3)
        await cluster.settled()
        await cluster.api.patch(DEPLOYMENTS, "g-decodeworker", {"spec": {"replicas": 0}}, NAMESPACE)
        await cluster.api.delete(SERVICES, "g-frontend", NAMESPACE)
        await cluster.api.delete(SECRETS, "g-link-worker", NAMESPACE)
        await until(
            lambda: (
                cluster.get(DEPLOYMENTS, "g-decodeworker")["spec"]["replicas"] == 2
                and cluster.get(SERVICES, "g-frontend")
                and cluster.get(SECRETS, "g-link-worker")
            )
        )


async def test_who_changes_an_object_again_and_again_is_not_fought_at_any_pace(cluster: Cluster) -> None:
    async with cluster.operator():
        await cluster.put(graph())
        await until(lambda: len(cluster.deployments()) == 3)
        await cluster.settled()
        changes = 0
        while "Contested" not in dict(await cluster.events()):
            found = cluster.get(DEPLOYMENTS, "g-decodeworker")
            if found["spec"]["replicas"] == 2:
                changes += 1
                await cluster.api.patch(DEPLOYMENTS, "g-decodeworker", {"spec": {"replicas": 1}}, NAMESPACE)
            await asyncio.sleep(0.05)
        assert changes == 1 + MENDS_MAX
        assert "Deployment g-decodeworker" in dict(await cluster.events())["Contested"]
        before = await cluster.settled()
        await asyncio.sleep(1)
        assert len(cluster.api.writes) == before


async def test_an_object_of_somebody_else_is_left_alone_and_named(cluster: Cluster) -> None:
    theirs = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": "g-frontend",
            "namespace": NAMESPACE,
            "labels": {"app.kubernetes.io/managed-by": "penstock-operator"},
        },
        "spec": {"ports": [{"port": 1}]},
    }
    await cluster.api.create(SERVICES, theirs)
    async with cluster.operator():
        await cluster.put(graph())
        await until(lambda: cluster.status().get("state") == "failed")
        assert "Service g-frontend" in cluster.condition("Ready")["message"]
        assert cluster.get(SERVICES, "g-frontend")["spec"] == {"ports": [{"port": 1}]}


NONE: dict[str, str] = {}


@pytest.mark.parametrize(
    ("writers", "annotations", "is_ours"),
    [
        (NONE, NONE, True),
        ({"penstock-operator": "2026-01-01T00:00:00Z"}, NONE, True),
        ({"manager": "2026-01-01T00:00:00Z"}, NONE, False),
        ({"manager": "2026-01-01T00:00:00Z", "penstock-operator": "2026-01-02T00:00:00Z"}, NONE, True),
        ({"manager": "2026-01-03T00:00:00Z", "penstock-operator": "2026-01-02T00:00:00Z"}, NONE, False),
        ({"manager": "2026-01-01T00:00:00Z"}, {"penstock.dev/take-over": "true"}, True),
        ({"kubectl-edit": "2026-01-01T00:00:00Z"}, NONE, True),
    ],
)
def test_a_graph_whose_status_another_operator_wrote_last_is_left_alone(
    writers: dict[str, str], annotations: dict[str, str], is_ours: bool
) -> None:
    found = graph()
    found["metadata"]["annotations"] = annotations
    found["metadata"]["managedFields"] = [
        {"manager": "kubectl", "time": "2027-01-01T00:00:00Z", "fieldsV1": {"f:spec": {}}},
        *({"manager": name, "time": at, "fieldsV1": {"f:status": {}}} for name, at in writers.items()),
    ]
    reason = other_operator(keep_status_writers(found))
    assert (reason == "") == is_ours
    if not is_ours:
        assert "'manager'" in reason
        assert "penstock.dev/take-over=true" in reason


async def test_replicas_belong_to_the_scaling_adapter_where_there_is_one(cluster: Cluster) -> None:
    scaled = graph()
    scaled["spec"]["services"]["DecodeWorker"]["scalingAdapter"] = {"enabled": True}
    async with cluster.operator():
        await cluster.put(scaled)
        await until(lambda: cluster.get(ADAPTERS, "g-decodeworker") and len(cluster.deployments()) == 3)
        assert cluster.get(ADAPTERS, "g-decodeworker")["spec"]["replicas"] == 2
        await cluster.api.patch(ADAPTERS, "g-decodeworker", {"spec": {"replicas": 4}}, NAMESPACE)
        await until(lambda: cluster.get(DEPLOYMENTS, "g-decodeworker")["spec"]["replicas"] == 4)
        await cluster.change(services={"DecodeWorker": {"replicas": 1}})
        await cluster.settled()
        assert cluster.get(DEPLOYMENTS, "g-decodeworker")["spec"]["replicas"] == 4
        assert cluster.get(ADAPTERS, "g-decodeworker")["spec"]["replicas"] == 4
        await cluster.make_ready()
        await until(
            lambda: (cluster.get(ADAPTERS, "g-decodeworker").get("status") or {}).get("replicas") == 4
        )
        selector = cluster.get(ADAPTERS, "g-decodeworker")["status"]["selector"]
        assert selector == "nvidia.com/selector=g-decodeworker"


async def test_certificates_are_renewed_while_nothing_else_changes(cluster: Cluster) -> None:
    async with cluster.operator():
        await cluster.put(graph())
        await until(lambda: len(cluster.deployments()) == 3)
        await cluster.settled()
    before = cluster.get(SECRETS, "g-link-worker")["data"]
    generations = {n: cluster.get(DEPLOYMENTS, n)["metadata"]["generation"] for n in DEPLOYMENT_NAMES}
    cluster.now += timedelta(days=70)
    async with cluster.operator():
        await until(lambda: cluster.get(SECRETS, "g-link-worker")["data"] != before)
        await cluster.settled()
    after = cluster.get(SECRETS, "g-link-worker")["data"]
    assert (after["secret"], after["ca.crt"]) == (before["secret"], before["ca.crt"])
    assert after["tls.crt"] != before["tls.crt"]
    assert generations == {
        n: cluster.get(DEPLOYMENTS, n)["metadata"]["generation"] for n in DEPLOYMENT_NAMES
    }


async def test_certificates_are_renewed_also_while_the_manifest_is_wrong(cluster: Cluster) -> None:
    async with cluster.operator():
        await cluster.put(graph())
        await until(lambda: len(cluster.deployments()) == 3)
        await cluster.change(services={"Frontend": {"componentType": "worker"}})
        await until(lambda: cluster.status().get("state") == "failed")
        await cluster.settled()
    before = cluster.get(SECRETS, "g-link-worker")["data"]
    cluster.now += timedelta(days=70)
    async with cluster.operator():
        await until(lambda: cluster.get(SECRETS, "g-link-worker")["data"] != before)


async def test_no_secret_is_told(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    async with cluster.operator():
        await cluster.put(graph())
        await until(lambda: len(cluster.deployments()) == 3)
        await cluster.settled()
    told = caplog.text + repr(await cluster.events()) + repr(cluster.status())
    for item in (await cluster.api.list(SECRETS)).items:
        assert all(value not in told for value in item["data"].values())


async def test_an_operator_that_lost_the_lease_writes_nothing(cluster: Cluster) -> None:
    cluster.leads = False
    await cluster.put(graph())
    before = len(cluster.api.writes)
    async with cluster.operator():
        await asyncio.sleep(0.5)
    assert len(cluster.api.writes) == before


async def test_an_outage_delays_and_loses_nothing(cluster: Cluster) -> None:
    async with cluster.operator():
        await cluster.put(graph())
        await until(lambda: len(cluster.deployments()) == 3)
        await cluster.settled()
        cluster.api.disconnect()
        await asyncio.sleep(0.5)
        cluster.api.connect()
        await cluster.put(graph(PrefillWorker=None))
        await until(lambda: cluster.deployments() == {"g-decodeworker", "g-frontend"})


@pytest.mark.parametrize("verb", ["apply", "create"])
async def test_an_operator_that_ends_at_any_write_is_followed_by_one_that_ends_the_work(verb: str) -> None:
    whole = Cluster()
    await whole.put(graph())
    async with whole.operator():
        await until(lambda: whole.status().get("state") == "pending")
        writes = await whole.settled()
    wanted = essence(await everything(whole))
    for count in range(0, writes, 5):
        assert essence(await ended_after(count, verb)) == wanted, count


async def ended_after(count: int, verb: str) -> list[Object]:
    """All there is once an operator's connection was cut after `count` calls, and another one followed."""
    cluster = Cluster()
    await cluster.put(graph())
    original = getattr(cluster.api, verb)
    calls = 0

    async def cut(*args: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > count:
            raise ApiError("the connection was cut")
        return await original(*args, **keywords)

    setattr(cluster.api, verb, cut)
    async with cluster.operator():
        await asyncio.sleep(0.25)
    setattr(cluster.api, verb, original)
    async with cluster.operator():
        await until(lambda: cluster.status().get("state") == "pending")
        await cluster.settled(0.2)
    return await everything(cluster)


async def test_one_namespace_can_be_managed_alone(cluster: Cluster) -> None:
    elsewhere = graph()
    elsewhere["metadata"]["namespace"] = "other"
    async with cluster.operator(NAMESPACE):
        await cluster.put(elsewhere)
        await cluster.put(graph())
        await until(lambda: len(cluster.deployments()) == 3)
        await cluster.settled()
        assert cluster.api.stored(DEPLOYMENTS, "g-frontend", "other") is None


async def test_a_pod_that_cannot_start_is_told_of_with_its_reason(cluster: Cluster) -> None:
    async with cluster.operator():
        await cluster.put_ready()
        await cluster.change(
            services={"DecodeWorker": {"extraPodSpec": {"mainContainer": {"image": "typo:1"}}}}
        )
        labels = {
            "penstock.dev/graph": "g",
            "nvidia.com/selector": "g-decodeworker",
            "nvidia.com/dynamo-graph-deployment-name": "g",
        }
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "g-decodeworker-1", "namespace": NAMESPACE, "labels": labels},
            "spec": {},
        }
        await cluster.api.create(PODS, pod)
        waiting = {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "typo:1"'}
        status = {"containerStatuses": [{"name": "main", "state": {"waiting": waiting}}]}
        await cluster.api.patch(
            PODS, "g-decodeworker-1", {"status": status}, NAMESPACE, subresource="status"
        )
        await until(lambda: cluster.status()["state"] == "failed")
        assert 'Back-off pulling image "typo:1"' in cluster.condition("Ready")["message"]
        assert cluster.condition("Progressing")["reason"] == "roll_is_stuck"
        await cluster.settled()
        assert "RollStuck" in dict(await cluster.events())


async def everything(cluster: Cluster) -> list[Object]:
    found: list[Object] = []
    for kind in (GRAPHS, DEPLOYMENTS, SERVICES, SECRETS):
        found += (await cluster.api.list(kind)).items
    return found


def essence(items: list[Object]) -> list[Object]:
    """Without what differs each time: versions, uids, times, and keys that are drawn."""
    kept = []
    for item in sorted(copy.deepcopy(items), key=lambda one: (one["kind"], name_of(one))):
        metadata = item["metadata"]
        kept.append(
            {
                "kind": item["kind"],
                "name": metadata["name"],
                "labels": metadata.get("labels"),
                "spec": item.get("spec"),
                "keys": sorted(item.get("data", {})),
            }
        )
    return kept
