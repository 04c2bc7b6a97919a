"""What goes wrong around an operator: other people's objects, graphs made again, namespaces that end, API
servers that answer oddly."""

from __future__ import annotations

import asyncio

import pytest

from penstock.kubernetes.api import ApiError, Kind, Object
from penstock.kubernetes.kinds import (
    DEPLOYMENTS,
    EVENTS,
    GRAPHS,
    LEADER_WORKER_SETS,
    SECRETS,
    SERVICES,
    VOLUME_CLAIMS,
)
from penstock.operator.idle import busyness_at
from tests.kubernetes_double import KubernetesDouble
from tests.operator.test_controller import NAMESPACE, Cluster, cluster, graph
from tests.waiting import until

__all__ = ["cluster"]

THEIR_SERVICE = (
    SERVICES,
    {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "g-frontend", "namespace": NAMESPACE, "labels": {"team": "theirs"}},
        "spec": {"ports": [{"port": 1}]},
    },
)
THEIR_CLAIM = (
    VOLUME_CLAIMS,
    {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "weights", "namespace": NAMESPACE},
        "spec": {"storageClassName": "theirs"},
    },
)


@pytest.mark.parametrize(("kind", "theirs"), [THEIR_SERVICE, THEIR_CLAIM])
async def test_an_object_without_our_labels_is_not_taken_over_and_outlives_the_graph(
    cluster: Cluster, kind: Kind, theirs: Object
) -> None:
    """Caches hold only what has our label, so such an object is seen nowhere before it is asked for."""
    before = await cluster.api.create(kind, theirs)
    mine = graph()
    mine["spec"]["pvcs"] = [
        {"name": "weights", "create": True, "size": "1Gi", "volumeAccessMode": "ReadWriteOnce"}
    ]
    async with cluster.operator():
        await cluster.put(mine)
        await until(lambda: cluster.status().get("state") == "failed")
        name = theirs["metadata"]["name"]
        assert f"{kind.name} {name} exists already" in cluster.condition("Ready")["message"]
        assert cluster.get(kind, name) == before
        await cluster.api.delete(GRAPHS, "g", NAMESPACE)
        await cluster.settled()
        assert cluster.get(kind, name) == before


async def test_a_graph_made_again_waits_quietly_for_what_its_predecessor_had(cluster: Cluster) -> None:
    async with cluster.operator():
        await cluster.put(graph())
        await until(lambda: len(cluster.deployments()) == 3)
        await cluster.settled()
        left = cluster.get(DEPLOYMENTS, "g-decodeworker")
        await cluster.api.delete(GRAPHS, "g", NAMESPACE)
        assert cluster.deployments() == set()
        await cluster.api.create(DEPLOYMENTS, left)  # as long as the garbage collector takes
        old_events = len((await cluster.api.list(EVENTS)).items)
        await cluster.put(graph())
        await until(lambda: cluster.status().get("state"))
        await cluster.settled()
        assert cluster.status()["state"] == "pending"
        assert (
            "Deployment g-decodeworker belongs to a deleted graph" in cluster.condition("Ready")["message"]
        )
        cluster.api.remove(DEPLOYMENTS, "g-decodeworker", NAMESPACE)
        await until(lambda: len(cluster.deployments()) == 3)
        await cluster.settled()
        new_events = (await cluster.api.list(EVENTS)).items[old_events:]
        assert [item["type"] for item in new_events if item["type"] != "Normal"] == []


async def test_a_graph_made_again_with_a_mistake_waits_as_quietly(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    async with cluster.operator():
        await cluster.put(graph())
        await until(lambda: len(cluster.deployments()) == 3)
        await cluster.settled()
        left = cluster.get(SECRETS, "g-link-ca")
        await cluster.api.delete(GRAPHS, "g", NAMESPACE)
        await cluster.api.create(SECRETS, left)
        await cluster.settled()
        await cluster.put(graph(Frontend=None))
        await until(lambda: cluster.status().get("state") == "failed")
        await cluster.settled()
    assert "Traceback" not in caplog.text


async def test_an_operator_that_knows_only_a_wrong_manifest_keeps_what_was_told_of_its_services(
    cluster: Cluster,
) -> None:
    async with cluster.operator():
        await cluster.put(graph())
        await until(lambda: len(cluster.deployments()) == 3)
        await cluster.settled()
    before = cluster.status()
    await cluster.put(graph(Frontend=None))
    async with cluster.operator():
        await until(lambda: cluster.status()["state"] == "failed")
        after = cluster.status()
    assert (after["ready"], after["services"]) == (before["ready"], before["services"])


async def test_in_a_namespace_that_is_being_deleted_nothing_is_tried_twice_or_told(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    ending = ApiError(
        'deployments.apps "g-x" is forbidden: unable to create new content in namespace ns because it is'
        " being terminated",
        403,
        "NamespaceTerminating",
    )
    await cluster.put(graph())
    before = cluster.api.calls["apply"]
    for verb in ("apply", "create"):
        cluster.api.fail_next(verb, ending, 1000)
    async with cluster.operator():
        await asyncio.sleep(2.0)
    assert cluster.api.calls["apply"] - before == 1
    assert [record.getMessage() for record in caplog.records if record.levelname != "INFO"] == []


async def test_a_token_that_is_not_taken_is_no_fault_of_graphs(cluster: Cluster) -> None:
    async with cluster.operator():
        await cluster.put(graph())
        await until(lambda: len(cluster.deployments()) == 3)
        await cluster.settled()
        cluster.api.fail_next("apply", ApiError("Unauthorized", 401, "Unauthorized"))
        await cluster.change(services={"PrefillWorker": {"replicas": 5}})
        await until(lambda: cluster.get(DEPLOYMENTS, "g-prefillworker")["spec"]["replicas"] == 5)
        await cluster.settled()
        assert cluster.status()["state"] == "pending"
        assert "NotApplied" not in dict(await cluster.events())


async def test_an_api_that_is_installed_later_is_used_without_a_restart(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.operator.controller.LOOK_FOR_APIS_S", 0.1)
    cluster.api = KubernetesDouble(unserved=(LEADER_WORKER_SETS,))
    wide = graph()
    wide["spec"]["services"]["DecodeWorker"]["multinode"] = {"nodeCount": 2}
    engine = "--engine=vllm"
    wide["spec"]["services"]["DecodeWorker"]["extraPodSpec"]["mainContainer"]["args"] += [engine]
    async with cluster.operator():
        await cluster.put(wide)
        await until(lambda: cluster.condition("Ready").get("reason") == "missing_api")
        cluster.api.serve(LEADER_WORKER_SETS)
        await until(lambda: cluster.get(LEADER_WORKER_SETS, "g-decodeworker"))


@pytest.mark.parametrize(
    "answer",
    [b"SSH-2.0-OpenSSH_9.2\r\n", b"", b'HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"at', b"\xff" * 99],
)
async def test_a_pod_that_answers_nonsense_does_not_hold_up_its_service(answer: bytes) -> None:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        assert await asyncio.to_thread(busyness_at, "127.0.0.1", port) == -1
