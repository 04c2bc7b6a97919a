"""Mistakes in a manifest: each is told in `kubectl get dgd` and by an event, in words that say what to
change, and nothing that runs is touched.

What the API server itself refuses at `kubectl apply` (unknown fields, wrong types and enums, long names) is
in the schemas, which tests/graph/test_crds.py holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from penstock.kubernetes.api import ApiError, Kind, Object
from penstock.kubernetes.kinds import DEPLOYMENTS, LEADER_WORKER_SETS
from penstock.operator.rendering.refusals import in_words
from tests.kubernetes_double import KubernetesDouble
from tests.operator.test_controller import DEPLOYMENT_NAMES, NAMESPACE, Cluster, cluster, graph
from tests.waiting import until

__all__ = ["cluster"]

DECODE = "spec.services.DecodeWorker"
Change = Callable[[Object], None]


def decode(**fields: Any) -> Change:
    """Fields of the decode service."""
    return lambda found: found["spec"]["services"]["DecodeWorker"].update(fields)


def command(*words: str) -> Change:
    """Another command for it."""

    def change(found: Object) -> None:
        main = found["spec"]["services"]["DecodeWorker"]["extraPodSpec"]["mainContainer"]
        main.pop("args")
        main["command"] = list(words)

    return change


def flags(*words: str) -> Change:
    """More flags for it."""

    def change(found: Object) -> None:
        found["spec"]["services"]["DecodeWorker"]["extraPodSpec"]["mainContainer"]["args"] += words

    return change


def annotated(**annotations: str) -> Change:
    given = {f"penstock.dev/{name}": value for name, value in annotations.items()}
    return lambda found: found["metadata"].update(annotations=given)


def without(*names: str) -> Change:
    def change(found: Object) -> None:
        for name in names:
            del found["spec"]["services"][name]

    return change


def graph_wide(**fields: Any) -> Change:
    return lambda found: found["spec"].update(fields)


def twin(found: Object) -> None:
    services = found["spec"]["services"]
    services["decodeworker"] = services["DecodeWorker"]


def limits(**amounts: str) -> Change:
    return decode(resources={"limits": amounts})


def claim(**fields: Any) -> Change:
    return graph_wide(pvcs=[{"name": "w", "create": True, "volumeAccessMode": "ReadWriteOnce", **fields}])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (decode(replica=3), f"{DECODE}.replica: unknown field (did you mean replicas?)"),
        (decode(replicas=-1), f"{DECODE}.replicas: expected an integer >= 0, got -1"),
        (decode(replicas="two"), f'{DECODE}.replicas: expected an integer >= 0, got "two"'),
        (decode(componentType="workr"), f"{DECODE}.componentType: expected one of"),
        (flags("--bolck-size", "16"), f"{DECODE}: --bolck-size: unknown flag (did you mean --block-size?)"),
        (flags("--block-size", "many"), f"{DECODE}: --block-size: expected"),
        (flags("--engine", "llama"), f"{DECODE}: --engine: expected one of"),
        (command("python3", "-m", "dynamo.vllm", "--modle", "m"), f"{DECODE}: --model: missing"),
        (command("penstock", "worker", "--role", "decode"), f"{DECODE}: --model: missing"),
        (command("python3", "-m", "dynamo.sglang", "--model", "m"), f"{DECODE}: cannot run"),
        (command("sh", "-c", "if true; then penstock worker; fi"), "`if` is not understood"),
        (annotated(engine="llama"), "metadata.annotations.penstock.dev/engine: expected one of"),
        (without("Frontend"), "spec.services: there is no frontend"),
        (without("DecodeWorker", "PrefillWorker"), "spec.services: there is no worker"),
        (twin, "spec.services: two names differ only in upper and lower case"),
        (limits(cpu="two"), f"{DECODE}.resources.limits.cpu: expected an amount such as 500m, 2 or 16Gi"),
        (limits(memory="16GB"), f"{DECODE}.resources.limits.memory: expected an amount"),
        (limits(gpu="1.5"), f"{DECODE}: resources.limits.gpu: expected a whole number, got '1.5'"),
        (limits(custom={"rdma/ib": "x"}), f"{DECODE}.resources.limits.custom.rdma/ib: expected an amount"),
        (decode(sharedMemory={"size": "lots"}), f"{DECODE}.sharedMemory.size: expected an amount"),
        (claim(size="ten"), "spec.pvcs[0].size: expected an amount"),
        (claim(), "spec.pvcs[0].size: missing, and create is true"),
        (decode(multinode={"nodeCount": 1}), f"{DECODE}.multinode.nodeCount: expected an integer >= 2"),
        (decode(extraPodSpec={"nodeSelektor": {}}), "extraPodSpec.nodeSelektor: unknown field"),
    ],
)
async def test_a_mistake_is_told_where_people_look_and_what_runs_goes_on(
    cluster: Cluster, caplog: pytest.LogCaptureFixture, change: Change, told: str
) -> None:
    async with cluster.operator():
        await cluster.put(graph())
        await until(lambda: cluster.status().get("state") == "pending")
        running = {name: cluster.get(DEPLOYMENTS, name) for name in DEPLOYMENT_NAMES}
        wrong = graph()
        change(wrong)
        await cluster.put(wrong)
        await until(lambda: cluster.condition("Ready").get("reason") == "manifest_is_invalid")
        assert told in cluster.condition("Ready")["message"]
        await until(lambda: "ManifestInvalid" in caplog.text)
        messages = [message for reason, message in await cluster.events() if reason == "ManifestInvalid"]
        assert told in messages[0]
        assert {name: cluster.get(DEPLOYMENTS, name) for name in DEPLOYMENT_NAMES} == running
        assert "Traceback" not in caplog.text


async def test_a_missing_api_is_told_and_the_other_services_are_made(cluster: Cluster) -> None:
    cluster.api = KubernetesDouble(unserved=(LEADER_WORKER_SETS,))
    wide = graph()
    decode(multinode={"nodeCount": 2})(wide)
    flags("--engine", "vllm")(wide)
    async with cluster.operator():
        await cluster.put(wide)
        await until(lambda: cluster.condition("Ready").get("reason") == "missing_api")
        told = "DecodeWorker: the cluster has no LeaderWorkerSet (leaderworkerset.x-k8s.io/v1)"
        assert cluster.condition("Ready")["message"] == told
        assert cluster.deployments() == {"g-frontend", "g-prefillworker"}


PROBE = "spec.template.spec.containers[0].livenessProbe.httpGet.port"
PORT = (
    f'Deployment.apps "g-decodeworker" is invalid: {PROBE}: Invalid value: 99999: must be between 1 and'
    " 65535, inclusive"
)
NAME = (
    "Invalid value: \"1 A\": a valid name must consist of x (e.g. 'my.env', regex used for validation is"
    " '[-._a-zA-Z]([a-z)*')"
)
LIVENESS = {"httpGet": {"path": "/live", "port": 99999}}


def deployment() -> Object:
    env = [{"name": "POD_IP"}, {"name": "1 A"}]
    spec = {
        "containers": [{"name": "main", "env": env, "livenessProbe": LIVENESS}],
        "volumes": [{"name": "v"}],
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "g-decodeworker"},
        "spec": {"template": {"spec": spec}},
    }


OF = "spec.services.DecodeWorker: the API server refuses Deployment g-decodeworker: "


@pytest.mark.parametrize(
    ("causes", "given", "told"),
    [
        ([], {}, f"{OF}{PROBE}: Invalid value: 99999: must be between 1 and 65535, inclusive"),
        (
            [(PROBE, "Invalid value: 99999: too much")],
            {"livenessProbe": LIVENESS},
            f"{OF}livenessProbe.httpGet.port: Invalid value: 99999: too much",
        ),
        (
            [(PROBE, "too much")],
            {},
            f"{OF}extraPodSpec.mainContainer.livenessProbe.httpGet.port: too much",
        ),
        (
            [("spec.template.spec.containers[0].env[1].name", NAME)],
            {},
            f'{OF}extraPodSpec.mainContainer.env[1 A].name: Invalid value: "1 A": a valid name must consist'
            " of x",
        ),
        (
            [
                ("spec.template.spec.volumes[0].hostPath", "Forbidden"),
                ("metadata.labels", "a"),
                ("metadata.labels", "a"),
            ],
            {},
            f"{OF}extraPodSpec.volumes[v].hostPath: Forbidden; labels: a",
        ),
        ([("spec.template.spec.volumes[9].x", "no")], {}, f"{OF}extraPodSpec.volumes[9].x: no"),
    ],
)
def test_what_the_api_server_refuses_is_told_in_the_manifest_s_words(
    causes: list[tuple[str, str]], given: Object, told: str
) -> None:
    error = ApiError(PORT, 422, "Invalid", tuple(causes))
    assert in_words(error, deployment(), "DecodeWorker", given) == told


@pytest.mark.parametrize(
    "error",
    [
        ApiError(PORT, 422, "Invalid", ((PROBE, "Invalid value: 99999"),)),
        ApiError("failed to create typed patch object: .spec.x: expected numeric", 500, "InternalError"),
    ],
)
async def test_a_refused_object_is_told_and_not_sent_again_at_once(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, error: ApiError
) -> None:
    async with cluster.operator():
        await cluster.put(graph())
        await until(lambda: cluster.status().get("state") == "pending")
        await cluster.settled()
        apply, refused = cluster.api.apply, 0

        async def refuse(kind: Kind, wanted: Object, manager: str, *, subresource: str = "") -> Object:
            nonlocal refused
            if kind == DEPLOYMENTS and wanted["spec"].get("replicas") == 7:
                refused += 1
                raise error
            return await apply(kind, wanted, manager, subresource=subresource)

        monkeypatch.setattr(cluster.api, "apply", refuse)
        await cluster.change(services={"DecodeWorker": {"replicas": 7}})
        await until(lambda: cluster.status().get("state") == "failed")
        ready = cluster.condition("Ready")
        assert ready["reason"] == "failed_to_reconcile_the_resources"
        assert ready["message"].startswith(f"{DECODE}: the API server refuses Deployment g-decodeworker: ")
        await cluster.settled()
        assert "NotApplied" in dict(await cluster.events())
        assert refused <= 2  # once more after the status was written


async def test_why_no_pods_are_made_is_told(cluster: Cluster) -> None:
    """A quota, a priority class or an account that is not there: no pod exists that could tell it."""
    async with cluster.operator():
        await cluster.put(graph())
        await until(lambda: len(cluster.deployments()) == 3)
        why = 'pods "g-decodeworker-1" is forbidden: exceeded quota: small'
        failure = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": why}
        told = {"status": {"conditions": [failure]}}
        await cluster.api.patch(DEPLOYMENTS, "g-decodeworker", told, NAMESPACE, subresource="status")
        await until(lambda: why in cluster.condition("Ready").get("message", ""))
