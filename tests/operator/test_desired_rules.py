"""Rules of rendering, one by one; test_desired.py holds whole answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from penstock.errors import ConfigError
from penstock.graph.manifest import ServiceSpec
from penstock.graph.versions import to_v1beta1
from penstock.kubernetes.api import Object
from penstock.kubernetes.kinds import DISRUPTION_BUDGETS, LEADER_WORKER_SETS
from penstock.operator import names
from penstock.operator.rendering.desired import _WITHOUT_EFFECT, desired
from penstock.operator.settings import ClusterFacts, Desired, RenderSettings

SETTINGS = RenderSettings(image="operators:1")
NO_FACTS = ClusterFacts()
OWN = ["penstock", "worker", "--engine", "reference", "--model", "/models/tiny"]
DYNAMO = ["python3", "-m", "dynamo.vllm", "--model", "org/model"]


def container(command: list[str], **more: Any) -> dict[str, Any]:
    return {"extraPodSpec": {"mainContainer": {"command": command, **more}}}


def graph(
    worker: dict[str, Any] | None = None,
    frontend: dict[str, Any] | None = None,
    annotations: dict[str, str] | None = None,
    **spec: Any,
) -> dict[str, Any]:
    """A graph `g` of a frontend and a worker."""
    return {
        "apiVersion": "nvidia.com/v1alpha1",
        "kind": "DynamoGraphDeployment",
        "metadata": {"name": "g", "annotations": annotations or {}},
        "spec": {
            **spec,
            "services": {
                "Frontend": container(["penstock", "frontend"]) | (frontend or {}),
                "Worker": container(OWN) | (worker or {}),
            },
        },
    }


def render(manifest: dict[str, Any], cluster: ClusterFacts = NO_FACTS) -> Desired:
    return desired(manifest, SETTINGS, cluster)


def deployment(found: Desired, name: str = "g-worker") -> Object:
    return next(
        item for item in found.objects if (item["kind"], item["metadata"]["name"]) == ("Deployment", name)
    )


def pod(found: Desired, name: str = "g-worker") -> Object:
    return deployment(found, name)["spec"]["template"]["spec"]


def main(found: Desired, name: str = "g-worker") -> Object:
    return pod(found, name)["containers"][0]


def flag(found: Desired, name: str, of: str = "g-worker") -> str | None:
    args = main(found, of)["args"]
    return args[args.index(f"--{name}") + 1] if f"--{name}" in args else None


def reasons(found: Desired) -> list[tuple[str, str]]:
    return [(note.service, note.reason) for note in found.notes]


# --- commands -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("worker", "annotations", "image", "noted"),
    [
        (container(OWN, image="own:1"), {}, "own:1", False),
        (container(OWN), {}, "operators:1", False),
        (container(DYNAMO, image="dynamo:1"), {}, "operators:1", True),
        (container(["sh", "-c", "exec penstock worker --model /m"], image="own:1"), {}, "own:1", False),
        (container(OWN, image="own:1"), {names.IMAGE: "chosen:1"}, "chosen:1", False),
        (container(DYNAMO, image="dynamo:1"), {names.IMAGE: "chosen:1"}, "chosen:1", False),
        (
            container(OWN, image="own:1") | {"annotations": {names.IMAGE: "service:1"}},
            {names.IMAGE: "chosen:1"},
            "service:1",
            False,
        ),
    ],
)
def test_which_image_runs(
    worker: dict[str, Any], annotations: dict[str, str], image: str, noted: bool
) -> None:
    found = render(graph(worker, annotations=annotations))
    assert main(found)["image"] == image
    assert (("Worker", "ImageReplaced") in reasons(found)) == noted


def test_a_working_folder_goes_with_its_image() -> None:
    assert main(render(graph(container(OWN, image="a", workingDir="/w"))))["workingDir"] == "/w"
    assert "workingDir" not in main(render(graph(container(DYNAMO, image="a", workingDir="/w"))))


def test_clients_name_a_model_as_the_manifest_does() -> None:
    """As Dynamo serves it, also where an annotation puts another in its place."""
    served = "served-model-name"
    assert flag(render(graph(container(DYNAMO))), served) == "org/model"
    assert flag(render(graph(container(OWN))), served) == "tiny"
    replaced = render(graph(container(DYNAMO), annotations={names.MODEL: "/models/tiny"}))
    assert (flag(replaced, served), flag(replaced, "model")) == ("org/model", "/models/tiny")
    named = container([*DYNAMO, "--served-model-name", "chat"])
    assert flag(render(graph(named, annotations={names.MODEL: "/models/tiny"})), served) == "chat"


def test_a_services_annotation_goes_before_the_graphs() -> None:
    worker = container(DYNAMO) | {"annotations": {names.ENGINE: "sim"}}
    found = render(graph(worker, annotations={names.ENGINE: "reference", names.MODEL: "/m"}))
    assert (flag(found, "engine"), flag(found, "model")) == ("sim", "/m")


def test_variables_of_the_cluster_are_left_to_the_kubelet() -> None:
    env = [
        {"name": "SIZE", "valueFrom": {"configMapKeyRef": {"name": "c", "key": "k"}}},
        {"name": "PLAIN", "value": "p"},
    ]
    words = [
        "sh",
        "-c",
        "penstock worker --engine reference --model /m/$SIZE-$PLAIN-$(SIZE)-$SECRET-${NO:-d}",
    ]
    worker = container(words, env=env) | {"envFromSecret": "s"}
    found = render(graph(worker))
    assert flag(found, "model") == "/m/$(SIZE)-p-$(SIZE)-$(SECRET)-d"
    assert found.notes == ()
    variables = {variable["name"]: variable for variable in main(found)["env"]}
    assert variables["SIZE"] == env[0]
    assert "SECRET" not in variables
    assert main(found)["envFrom"] == [{"secretRef": {"name": "s"}}]
    with pytest.raises(ConfigError, match=r"^spec.services.Worker: \$SECRET is not set in the manifest$"):
        render(graph(container(words, env=env)))


def test_address_of_a_store_comes_from_a_secret() -> None:
    from_secret = {
        "name": "PENSTOCK_RESPONSE_STORE",
        "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}},
    }
    password = {"name": "REDIS_PASSWORD", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}
    composed = {"name": "PENSTOCK_RESPONSE_STORE", "value": "redis://:$(REDIS_PASSWORD)@redis:6379"}
    for env in ([from_secret], [password, composed]):
        frontend = {"componentType": "frontend", "extraPodSpec": {"mainContainer": {"env": env}}}
        found = render(graph(container(OWN), frontend=frontend))
        variables = main(found, "g-frontend")["env"]
        assert [variable for variable in variables if variable in env] == env
        assert found.notes == ()


def test_a_value_that_must_be_known_is_named_as_written() -> None:
    env = [{"name": "N", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]
    with pytest.raises(ConfigError, match=r'--max-running: expected an integer >= 1, got "\$\(N\)"'):
        render(graph(container([*OWN, "--max-running", "$(N)"], env=env)))


def test_dollar_signs_in_a_command_stay_dollar_signs() -> None:
    found = render(graph(container(["sh", "-c", "penstock worker --model '/m/$$$$x'"])))
    assert flag(found, "model") == "/m/$$$x"  # which the kubelet reads as /m/$$x, as it read the manifest


@pytest.mark.parametrize(
    ("command", "annotations", "expected"),
    [
        (OWN, {}, "kubernetes:"),
        ([*OWN, "--discovery", "file:/d"], {}, "kubernetes:"),
        ([*OWN, "--discovery", "etcd://e:2379"], {}, "etcd://e:2379"),
        (OWN, {names.DISCOVERY: "etcd://f:2379"}, "etcd://f:2379"),
        ([*OWN, "--discovery", "etcd://e:2379"], {names.DISCOVERY: "kubernetes:"}, "kubernetes:"),
    ],
)
def test_discovery(command: list[str], annotations: dict[str, str], expected: str) -> None:
    assert flag(render(graph(container(command), annotations=annotations)), "discovery") == expected


def test_only_who_asks_the_api_server_may() -> None:
    by_api = render(graph())
    assert pod(by_api, "g-frontend")["serviceAccountName"] == "g-frontend"
    assert pod(by_api, "g-frontend")["automountServiceAccountToken"] is True
    assert pod(by_api)["automountServiceAccountToken"] is False
    by_etcd = render(graph(annotations={names.DISCOVERY: "etcd://e"}))
    assert pod(by_etcd, "g-frontend")["automountServiceAccountToken"] is False
    assert {item["kind"] for item in by_etcd.objects} == {"Deployment", "Service"}


# --- the end, the drain, the roll ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "given_s", "expected_s", "noted"),
    [
        (OWN, None, 180 + 30 + 15, False),
        ([*OWN, "--drain-s", "20.5", "--handoff-ttl-s", "10"], None, 46, False),
        (OWN, 100, 225, True),
        (OWN, 900, 900, False),
    ],
)
def test_a_pod_gets_the_time_that_its_drain_takes(
    command: list[str], given_s: int | None, expected_s: int, noted: bool
) -> None:
    worker = container(command)
    if given_s is not None:
        worker["extraPodSpec"]["terminationGracePeriodSeconds"] = given_s
    found = render(graph(worker))
    assert pod(found)["terminationGracePeriodSeconds"] == expected_s
    assert (("Worker", "GracePeriodRaised") in reasons(found)) == noted


def test_a_drain_may_be_set_by_a_variable() -> None:
    found = render(graph(container(OWN, env=[{"name": "PENSTOCK_DRAIN_S", "value": "60"}])))
    assert flag(found, "drain-s") is None
    assert pod(found)["terminationGracePeriodSeconds"] == 60 + 30 + 15


@pytest.mark.parametrize(
    ("annotations", "expected"),
    [
        ({}, {"maxSurge": "25%", "maxUnavailable": "25%"}),
        ({names.STRATEGY: "RampedSlowRollout"}, {"maxSurge": 1, "maxUnavailable": 0}),
        ({names.STRATEGY: "BestEffortControlledRollout"}, {"maxSurge": 0, "maxUnavailable": "20%"}),
        ({names.MAX_SURGE: "2", names.MAX_UNAVAILABLE: "0"}, {"maxSurge": 2, "maxUnavailable": 0}),
        ({names.STRATEGY: "Recreate", names.MAX_SURGE: "2"}, None),
    ],
)
def test_how_a_service_rolls(annotations: dict[str, str], expected: Object | None) -> None:
    found = render(graph({"annotations": annotations}))
    strategy = deployment(found)["spec"]["strategy"]
    assert strategy.get("rollingUpdate") == expected
    assert strategy["type"] == ("RollingUpdate" if expected else "Recreate")
    # To change how a service rolls must not roll it.
    assert "annotations" not in deployment(found)["spec"]["template"]["metadata"]


def test_a_restart_changes_all_pods_and_nothing_else() -> None:
    before, after = render(graph()), render(graph(restart={"id": "again"}))
    for name in ("g-frontend", "g-worker"):
        changed = deployment(after, name)
        assert changed != deployment(before, name)
        assert changed["spec"]["template"]["metadata"].pop("annotations") == {names.RESTARTED: "again"}
        assert changed == deployment(before, name)


def test_replicas_belong_to_an_adapter_once_it_is_there() -> None:
    manifest = graph({"replicas": 2, "scalingAdapter": {"enabled": True}})
    first = render(manifest)
    assert deployment(first)["spec"]["replicas"] == 2
    (adapter,) = first.adapters
    assert adapter["spec"] == {"replicas": 2, "dgdRef": {"name": "g", "serviceName": "Worker"}}
    later = render(manifest, ClusterFacts(frozenset({DISRUPTION_BUDGETS}), {"Worker": 7, "Frontend": 9}))
    assert deployment(later)["spec"]["replicas"] == 7
    assert deployment(later, "g-frontend")["spec"]["replicas"] == 1  # its adapter is somebody else's
    assert later.services[1].replicas == 7
    assert [item["apiVersion"] for item in later.objects if item["kind"] == "PodDisruptionBudget"] == [
        "policy/v1"
    ]


# --- resources, probes, placement ---------------------------------------------------------------------

FOR_ANOTHER = "not requested: the manifest's amounts are for another engine"
LEAST = {"requests": {"cpu": "100m", "memory": "256Mi"}}
GPUS = {"limits": {"cpu": "8", "memory": "16Gi", "gpu": "1"}, "requests": {"custom": {"rdma/ib": "2"}}}


@pytest.mark.parametrize(
    ("worker", "annotations", "expected", "noted"),
    [
        (
            container(DYNAMO) | {"resources": GPUS},
            {},
            {
                "requests": {"rdma/ib": "2"},
                "limits": {"cpu": "8", "memory": "16Gi", "nvidia.com/gpu": "1", "rdma/ib": "2"},
            },
            "",
        ),
        (
            container(DYNAMO, resources={"limits": {"nvidia.com/gpu": "1"}}) | {"resources": GPUS},
            {names.ENGINE: "reference"},
            LEAST,
            f"rdma/ib, cpu, memory, nvidia.com/gpu {FOR_ANOTHER}",
        ),
        # Its own engine's amounts stay, but for GPUs: it has no use for them.
        (
            {"resources": {"limits": {"cpu": "1", "gpu": "1"}}},
            {names.ENGINE: "reference"},
            {"limits": {"cpu": "1"}},
            "nvidia.com/gpu not requested: the reference engine runs on the CPU",
        ),
        ({}, {}, LEAST, ""),
        ({"resources": {"limits": {"gpu": "0"}}}, {}, LEAST, ""),
    ],
)
def test_what_is_requested(
    worker: dict[str, Any], annotations: dict[str, str], expected: Object, noted: str
) -> None:
    found = render(graph(worker, annotations=annotations))
    assert main(found)["resources"] == expected
    notes = [note.message for note in found.notes if note.reason == "ResourcesNotRequested"]
    assert notes == ([noted] if noted else [])


def test_a_frontend_is_sized_for_its_workers_engines() -> None:
    frontend = {"resources": {"limits": {"cpu": "2"}}}
    manifest = graph(container(DYNAMO), frontend, {names.ENGINE: "reference"})
    replaced = render(manifest)
    assert main(replaced, "g-frontend")["resources"] == LEAST
    assert [note.message for note in replaced.notes if note.service == "Frontend"] == [f"cpu {FOR_ANOTHER}"]
    manifest["spec"]["services"]["Other"] = container(OWN)
    assert main(render(manifest), "g-frontend")["resources"] == {"limits": {"cpu": "2"}}


def test_amounts_of_the_container_itself_are_for_the_same_engine() -> None:
    worker = container(DYNAMO, resources={"limits": {"nvidia.com/gpu": 1, "memory": "1Gi"}})
    assert main(render(graph(worker)))["resources"]["limits"] == {"nvidia.com/gpu": 1, "memory": "1Gi"}
    replaced = render(graph(worker, annotations={names.ENGINE: "reference"}))
    assert main(replaced)["resources"] == LEAST
    messages = [note.message for note in replaced.notes]
    assert messages == [f"nvidia.com/gpu, memory {FOR_ANOTHER}"]


def test_shared_memory_is_for_engines_on_gpus_unless_asked_for() -> None:
    def sizes(worker: dict[str, Any]) -> list[str]:
        volumes = pod(render(graph(worker)))["volumes"]
        return [volume["emptyDir"]["sizeLimit"] for volume in volumes if volume["name"] == "shared-memory"]

    assert sizes(container(DYNAMO)) == ["8Gi"]
    assert sizes(container(DYNAMO) | {"sharedMemory": {"disabled": True}}) == []
    assert sizes(container(OWN)) == []
    assert sizes(container(OWN) | {"sharedMemory": {"size": 1024}}) == ["1024"]


def test_probes_follow_the_port_that_the_manifest_sets() -> None:
    found = render(graph(container(OWN, env=[{"name": "DYN_SYSTEM_PORT", "value": "9191"}])))
    assert flag(found, "system-port") == "9191"
    assert {"containerPort": 9191, "name": "system", "protocol": "TCP"} in main(found)["ports"]
    assert main(found)["livenessProbe"]["httpGet"] == {"path": "/live", "port": "system"}
    assert main(found)["livenessProbe"]["failureThreshold"] > 1
    without = main(render(graph(container([*OWN, "--system-port", "-1"]))))
    assert not {"livenessProbe", "readinessProbe", "startupProbe"} & set(without)


def test_ports_of_the_manifest_join_those_of_the_operator() -> None:
    worker = container(
        OWN, ports=[{"containerPort": 1, "name": "x"}, {"containerPort": 7000, "hostPort": 7}]
    )
    worker["extraPodSpec"]["containers"] = [
        {"name": "sidecar", "ports": [{"containerPort": 2, "protocol": "UDP"}]}
    ]
    found = pod(render(graph(worker)))
    ports = [
        [(port["containerPort"], port["protocol"]) for port in each["ports"]]
        for each in found["containers"]
    ]
    assert ports == [[(7000, "TCP"), (7100, "TCP"), (9090, "TCP"), (1, "TCP")], [(2, "UDP")]]
    link = found["containers"][0]["ports"][0]
    assert (link["name"], link["hostPort"]) == ("link", 7)


def test_a_frontend_with_a_certificate_is_asked_over_https() -> None:
    command = ["penstock", "frontend", "--http-tls-cert", "/c", "--http-tls-key", "/k"]
    found = main(render(graph(frontend=container(command))), "g-frontend")
    assert {found[probe]["httpGet"]["scheme"] for probe in ("livenessProbe", "readinessProbe")} == {"HTTPS"}


def test_a_containers_own_probe_goes_before_its_services() -> None:
    own, of_service = {"tcpSocket": {"port": 1}}, {"tcpSocket": {"port": 2}}
    worker = container(OWN, livenessProbe=own) | {"livenessProbe": of_service, "readinessProbe": of_service}
    found = main(render(graph(worker)))
    assert (found["livenessProbe"], found["readinessProbe"]) == (own, of_service)


def test_only_prefill_and_decode_wish_to_be_near_each_other() -> None:
    assert "affinity" not in pod(render(graph()))
    manifest = graph(container([*OWN, "--role", "prefill"]), annotations={names.TOPOLOGY_KEY: "rack"})
    manifest["spec"]["services"]["Decode"] = container([*OWN, "--role", "decode"])
    found = render(manifest)
    assert "affinity" not in pod(found, "g-frontend")
    for name in ("g-worker", "g-decode"):
        (wish,) = pod(found, name)["affinity"]["podAffinity"][
            "preferredDuringSchedulingIgnoredDuringExecution"
        ]
        assert wish["podAffinityTerm"]["topologyKey"] == "rack"
    assert found.roles == ("frontend", "prefill", "decode")


@pytest.mark.parametrize(
    ("wishes", "of_pod", "of_container"),
    [
        ({}, {"runAsNonRoot": True, "runAsUser": 10001}, {"allowPrivilegeEscalation": False}),
        ({"runAsUser": 0}, {"runAsUser": 10001}, {"allowPrivilegeEscalation": False, "runAsUser": 0}),
        (
            {"runAsUser": 5},
            {"runAsNonRoot": True, "runAsUser": 10001},
            {"allowPrivilegeEscalation": False, "runAsUser": 5},
        ),
        ({"privileged": True}, {"runAsNonRoot": True, "runAsUser": 10001}, {"privileged": True}),
        (
            {"capabilities": {"add": ["SYS_ADMIN"]}},
            {"runAsNonRoot": True, "runAsUser": 10001},
            {"capabilities": {"add": ["SYS_ADMIN"], "drop": ["ALL"]}},
        ),
    ],
)
def test_security_is_strict_and_makes_way(
    wishes: dict[str, Any], of_pod: Object, of_container: Object
) -> None:
    found = render(graph(container(OWN, securityContext=wishes)))
    fields = ("runAsNonRoot", "runAsUser")
    context = pod(found)["securityContext"]
    assert {field: context[field] for field in fields if field in context} == of_pod
    always = {"capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": True}
    assert main(found)["securityContext"] == always | of_container


def test_vllm_may_write_where_it_likes() -> None:
    assert "readOnlyRootFilesystem" not in main(render(graph(container(DYNAMO))))["securityContext"]


# --- the other version of the API ---------------------------------------------------------------------


def test_both_versions_of_a_graph_are_rendered_alike() -> None:
    older = graph(container(DYNAMO) | {"componentType": "worker", "replicas": 2, "resources": GPUS})
    newer = to_v1beta1(older)
    assert newer["apiVersion"] != older["apiVersion"]
    assert render(newer).objects == render(older).objects
    newer["spec"]["components"][1]["podTemplate"]["metadata"] = {"annotations": {names.ENGINE: "llama"}}
    with pytest.raises(ConfigError, match=r"^spec\.components\[Worker\]\.annotations"):
        render(newer)


# --- what is told -------------------------------------------------------------------------------------


def test_every_field_of_a_service_has_an_effect_or_a_note() -> None:
    harmless = {"serviceName", "subComponentType"}  # names; the command says what runs
    assert set(_WITHOUT_EFFECT) | harmless == ServiceSpec.ACCEPTED
    given = {field: {"enabled": True} for field in _WITHOUT_EFFECT}
    found = render(graph(given))
    assert reasons(found) == [("Worker", "FieldIgnored")] * len(_WITHOUT_EFFECT)


def test_a_graph_with_frontends_beside_its_workers_gets_a_frontend() -> None:
    document = graph(container(DYNAMO) | {"componentType": "worker", "frontendSidecar": {"image": "f"}})
    del document["spec"]["services"]["Frontend"]
    found = render(document)
    made = {(one["kind"], one["metadata"]["name"]) for one in found.objects}
    assert {("Deployment", "g-frontend"), ("Service", "g-frontend")} <= made
    assert any("its frontend sidecar is not run" in note.message for note in found.notes)


def test_nulls_say_nothing() -> None:
    worker = container(OWN, env=None, securityContext=None) | {"resources": None, "envs": None}
    worker["extraPodSpec"]["volumes"] = None
    assert render(graph(worker)).objects == render(graph()).objects


def test_a_missing_api_is_named_and_takes_nothing_else_with_it() -> None:
    ingress = {"ingress": {"enabled": True, "host": "h"}}
    found = render(graph(container(DYNAMO) | {"multinode": {"nodeCount": 2}}, ingress))
    assert {item["kind"] for item in found.objects} == {
        *("ServiceAccount", "Role", "RoleBinding", "Deployment", "Service")
    }
    assert reasons(found) == [("Frontend", "ApiMissing"), ("Worker", "ApiMissing")]
    assert found.services[1].missing_api == "LeaderWorkerSet (leaderworkerset.x-k8s.io/v1)"
    assert found.services[0].missing_api == ""


def test_an_engine_on_cpus_needs_one_node() -> None:
    worker = container(DYNAMO) | {"multinode": {"nodeCount": 4}}
    found = render(graph(worker, annotations={names.ENGINE: "sim"}))
    assert deployment(found)["spec"]["replicas"] == 1
    assert ("Worker", "MultinodeIgnored") in reasons(found)


def test_all_that_is_wrong_is_told_at_once() -> None:
    manifest = graph(
        {"annotations": {names.STRATEGY: "Slow", names.DISCOVERY: "zookeeper://z"}},
        {"annotations": {names.MAX_SURGE: "0", names.MAX_UNAVAILABLE: "0%"}},
        pvcs=[{"name": "a", "create": True}],
    )
    with pytest.raises(ConfigError) as caught:
        render(manifest)
    assert str(caught.value).splitlines() == [
        "spec.services.Worker: annotation penstock.dev/discovery: --discovery: expected file:,"
        ' etcd://HOST:PORT or kubernetes:, got "zookeeper://z"',
        "spec.services.Frontend: annotations nvidia.com/deployment-rolling-update-max-surge and"
        " nvidia.com/deployment-rolling-update-max-unavailable: both are 0",
        "spec.pvcs[0].size: missing, and create is true",
        "spec.pvcs[0].volumeAccessMode: missing, and create is true",
    ]


@pytest.mark.parametrize(
    ("manifest", "error"),
    [
        (
            graph(annotations={names.ENGINE: "llama"}),
            'metadata.annotations.penstock.dev/engine: expected one of reference, vllm, sim, got "llama"',
        ),
        (
            graph(annotations={names.LOG_RELAYS: "yes"}),
            'metadata.annotations.penstock.dev/log-relays: expected true or false, got "yes"',
        ),
        (
            graph(annotations={names.DISCOVERY: "file:/d"}),
            "spec.services.Frontend: annotation penstock.dev/discovery: pods have no common folder;"
            " expected etcd://...",
        ),
        (
            graph({"annotations": {names.MAX_SURGE: "many"}}),
            "spec.services.Worker: annotation nvidia.com/deployment-rolling-update-max-surge: expected a"
            " number or a percentage, got 'many'",
        ),
        (
            graph({"annotations": {names.STRATEGY: "Slow"}}),
            "spec.services.Worker: annotation nvidia.com/deployment-strategy: expected one of"
            " RollingUpdate, RampedSlowRollout, BestEffortControlledRollout, Recreate, got 'Slow'",
        ),
        (
            graph({"multinode": {"nodeCount": 1}}),
            "spec.services.Worker.multinode.nodeCount: expected an integer >= 2, got 1",
        ),
        (
            graph({"resources": {"limits": {"nodes": "two"}}}),
            "spec.services.Worker: resources.limits.nodes: expected a whole number from 1, got 'two'",
        ),
    ],
)
def test_what_makes_no_sense_is_named(manifest: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError) as caught:
        render(manifest)
    assert str(caught.value).splitlines()[0] == error


def test_names_that_a_cluster_refuses_are_refused_before() -> None:
    manifest = graph()
    manifest["metadata"]["name"] = "9" * 45
    manifest["spec"]["services"]["W" * 20] = manifest["spec"]["services"].pop("Worker")
    with pytest.raises(ConfigError) as caught:
        render(manifest)
    first, second = str(caught.value).splitlines()
    assert first.endswith("and a Service's name begins with a letter")
    assert second.endswith("longer than 63 characters; shorten its name or the graph's")


def test_labels_by_which_pods_are_found_stay() -> None:
    found = render(graph({"labels": {"team": "a", names.SELECTOR: "x", "app": "mine"}}))
    labels = deployment(found)["spec"]["template"]["metadata"]["labels"]
    assert (labels["team"], labels["app"], labels[names.SELECTOR]) == ("a", "mine", "g-worker")
    assert ("Worker", "LabelIgnored") in reasons(found)
    assert deployment(found)["metadata"]["labels"][names.SELECTOR] == "g-worker"


def test_the_operator_makes_the_links_secrets() -> None:
    found = render(graph(container([*OWN, "--link-secret-file", "/mine"])))
    assert flag(found, "link-secret-file") == "/etc/penstock/link/secret"
    assert ("Worker", "FlagsReplaced") in reasons(found)
    secrets = {
        name: [
            volume["secret"]["secretName"] for volume in pod(found, name)["volumes"] if "secret" in volume
        ]
        for name in ("g-frontend", "g-worker")
    }
    assert secrets == {"g-frontend": ["g-link-frontend"], "g-worker": ["g-link-worker"]}


# --- several nodes ------------------------------------------------------------------------------------


def test_only_the_leader_is_found_and_has_the_links_secret() -> None:
    manifest = graph(container([*DYNAMO, "--is-prefill-worker"]) | {"multinode": {"nodeCount": 3}})
    found = render(manifest, ClusterFacts(frozenset({LEADER_WORKER_SETS})))
    group = next(item for item in found.objects if item["kind"] == "LeaderWorkerSet")
    templates = group["spec"]["leaderWorkerTemplate"]
    leader, follower = templates["leaderTemplate"], templates["workerTemplate"]
    assert names.DISCOVERED_BY in leader["metadata"]["labels"]
    assert names.DISCOVERED_BY not in follower["metadata"]["labels"]
    assert "g-link-worker" in repr(leader)
    assert "g-link-worker" not in repr(follower)
    args = follower["spec"]["containers"][0]["args"]
    assert args[:3] == ["serve", "org/model", "--headless"]
    assert json.loads(args[args.index("--kv-transfer-config") + 1])["kv_role"] == "kv_producer"
    assert ("Worker", "HandoffsRecomputed") in reasons(found)
