"""What deploy/ applies to a cluster, as far as that can be said without one."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.options.config import OperatorOptions
from penstock.options.flags import build_options
from tests.deploy.manifests import (
    CONNECTIONS,
    DEPLOY,
    PLAIN,
    SCOPES,
    allows,
    objects,
    of_kind,
    pod_labels,
)

CLUSTER_KINDS = {"ClusterRole", "ClusterRoleBinding"}
CRDS = ["dynamographdeployments.nvidia.com", "dynamographdeploymentscalingadapters.nvidia.com"]
# By scope: all that the operator may do, as (resource, verbs), besides its own Lease and certificate.
OBJECTS = "create delete get list patch watch"
GRANTED = {
    "dynamographdeployments": "get list watch",
    "dynamographdeployments/status": "patch",
    "dynamographdeployments/finalizers": "update",
    "dynamographdeploymentscalingadapters": OBJECTS,
    "dynamographdeploymentscalingadapters/status": "patch",
    "dynamographdeploymentscalingadapters/finalizers": "update",
    "deployments": OBJECTS,
    "services": OBJECTS,
    "serviceaccounts": OBJECTS,
    "secrets": OBJECTS,
    "persistentvolumeclaims": OBJECTS,
    "ingresses": OBJECTS,
    "poddisruptionbudgets": OBJECTS,
    "leaderworkersets": OBJECTS,
    "roles": OBJECTS,
    "rolebindings": OBJECTS,
    "pods": "get list patch watch",
    "pods/log": "get",
    "events": "create",
}


def granted(role: dict[str, Any]) -> dict[str, str]:
    """Resource to verbs, of the rules that name no single objects."""
    verbs: dict[str, set[str]] = {}
    for rule in role["rules"]:
        for resource in rule["resources"]:
            if "resourceNames" not in rule:
                verbs.setdefault(resource, set()).update(rule["verbs"])
    return {resource: " ".join(sorted(found)) for resource, found in verbs.items()}


@pytest.mark.parametrize("scope", SCOPES)
def test_the_operator_may_do_what_it_does_and_no_more(scope: str) -> None:
    found = objects(f"kubernetes/{scope}/operator.yaml")
    roles, cluster_roles = of_kind(found, "Role"), of_kind(found, "ClusterRole")
    main = (
        roles["penstock-operator"]
        if scope == "namespaced"
        else cluster_roles["dynamo-cloud-penstock-operator"]
    )
    assert granted(main) == GRANTED
    # What names no single object, of the roles besides.
    assert granted(roles["penstock-operator-election"]) == {"leases": "create"}
    crds = cluster_roles["dynamo-cloud-penstock-operator-crds"]
    assert granted(crds) == {}
    [rule] = crds["rules"]
    assert (rule["resourceNames"], rule["verbs"]) == (CRDS, ["get", "patch"])
    assert len(roles) + len(cluster_roles) == 3


@pytest.mark.parametrize("scope", SCOPES)
def test_every_role_is_bound_to_the_operator_alone(scope: str) -> None:
    found = objects(f"kubernetes/{scope}/operator.yaml")
    for kind in ("Role", "ClusterRole"):
        bindings = of_kind(found, f"{kind}Binding")
        assert sorted(bindings) == sorted(of_kind(found, kind))
        for name, binding in bindings.items():
            assert binding["roleRef"] == {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": kind,
                "name": name,
            }
            assert binding["subjects"] == [
                {"kind": "ServiceAccount", "name": "penstock-operator", "namespace": "dynamo-cloud"}
            ]


@pytest.mark.parametrize("scope", SCOPES)
def test_all_that_has_a_namespace_names_it(scope: str) -> None:
    for item in objects(f"kubernetes/{scope}/operator.yaml"):
        expected = None if item["kind"] in CLUSTER_KINDS else "dynamo-cloud"
        assert item["metadata"].get("namespace") == expected, item["metadata"]["name"]
        # One installation must not change what belongs to that of another namespace.
        assert item["kind"] not in CLUSTER_KINDS or item["metadata"]["name"].startswith("dynamo-cloud-")


@pytest.mark.parametrize(("scope", "watched"), [("namespaced", "$(POD_NAMESPACE)"), ("cluster-wide", "")])
def test_the_operators_pod(scope: str, watched: str) -> None:
    found = objects(f"kubernetes/{scope}/operator.yaml")
    deployment = of_kind(found, "Deployment")["penstock-operator"]
    pod = deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["command"] == ["penstock", "operator"]
    flags = dict(zip(container["args"][::2], container["args"][1::2], strict=True))
    assert flags == {"--watch-namespace": watched, "--system-port": "8081", "--webhook-port": "9443"}
    given = {name.removeprefix("--"): value for name, value in flags.items()}
    told = {entry["name"]: entry.get("value", "seen") for entry in container["env"]}
    options = build_options(OperatorOptions, given, told)
    assert (options.image, options.lease_namespace) == ("penstock-vllm:latest", "seen")
    assert (options.drain_s, options.topology_key) == (180.0, "topology.kubernetes.io/zone")
    # Otherwise the API server calls a webhook by a name that its certificate has not.
    assert options.webhook_service in of_kind(found, "Service")
    variables = {entry["name"]: entry for entry in container["env"]}
    for name, field in (("POD_NAME", "metadata.name"), ("POD_NAMESPACE", "metadata.namespace")):
        assert variables[name]["valueFrom"]["fieldRef"]["fieldPath"] == field
    # What Kubernetes' Pod Security Standards call restricted.
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert deployment["spec"]["replicas"] == 2


@pytest.mark.parametrize("scope", SCOPES)
def test_services_and_probes_name_ports_that_the_pod_has(scope: str) -> None:
    found = objects(f"kubernetes/{scope}/operator.yaml")
    template = of_kind(found, "Deployment")["penstock-operator"]["spec"]["template"]
    [container] = template["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"system": 8081, "webhook": 9443}
    service = of_kind(found, "Service")["penstock-operator"]["spec"]
    assert {port["targetPort"]: port["port"] for port in service["ports"]} == {
        "webhook": 443,
        "system": 8081,
    }
    assert service["selector"].items() <= template["metadata"]["labels"].items()
    probed = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")]
    assert [(probe["path"], probe["port"]) for probe in probed] == [
        ("/live", "system"),
        ("/live", "system"),
        ("/health", "system"),
    ]


@pytest.mark.parametrize(("source", "role", "port", "allowed"), CONNECTIONS)
def test_who_may_connect_to_the_pods_of_graphs(
    source: dict[str, str] | None, role: str, port: int, allowed: bool
) -> None:
    policies = objects("kubernetes/network-policies/policies.yaml")
    assert allows(policies, pod_labels("mine", role), port, source) is allowed


def test_anybody_may_connect_to_the_operators_webhook_and_metrics_only() -> None:
    policies = objects("kubernetes/network-policies/policies.yaml")
    operator = of_kind(objects("kubernetes/namespaced/operator.yaml"), "Deployment")["penstock-operator"]
    labels = operator["spec"]["template"]["metadata"]["labels"]
    assert [allows(policies, labels, port, None) for port in (9443, 8081, 22)] == [True, True, False]
    assert allows(policies, {"app": "somebody else's"}, 22, None)


def test_policies_go_where_kubectl_is_told() -> None:
    assert all(
        "namespace" not in item["metadata"] for item in objects("kubernetes/network-policies/policies.yaml")
    )


@pytest.mark.parametrize(
    "path", sorted(PLAIN.glob("*/kustomization.yaml")), ids=lambda path: path.parent.name
)
def test_kustomizations_name_files_that_are_there(path: Any) -> None:
    [kustomization] = objects(str(path.relative_to(DEPLOY)))
    assert all((path.parent / name).is_file() for name in kustomization["resources"])


def test_the_crds_are_those_that_the_roles_name() -> None:
    [kustomization] = objects("crds/kustomization.yaml")
    assert [f"nvidia.com_{name.removesuffix('.nvidia.com')}.yaml" for name in CRDS] == kustomization[
        "resources"
    ]
    for name, path in zip(CRDS, kustomization["resources"], strict=True):
        [crd] = objects(f"crds/{path}")
        assert crd["metadata"]["name"] == name
        # deploy.sh and cleanup.sh tell by it that a kind is Penstock's.
        assert crd["metadata"]["labels"]["app.kubernetes.io/part-of"] == "penstock"


def test_the_documents_folder_has_the_shipped_manifest() -> None:
    """`kubectl apply -f multinode-vllm.yaml`, then `cd ..` and `./deploy.sh multinode-vllm`."""
    assert (DEPLOY / "multinode-vllm/multinode-vllm.yaml").samefile(DEPLOY / "multinode-vllm.yaml")
    [graph] = objects("multinode-vllm.yaml")
    assert graph["metadata"]["annotations"] == {"penstock.dev/log-relays": "true"}


def test_the_kubectl_preference_only_defaults_the_type_of_patches() -> None:
    option = {"name": "type", "default": "merge"}
    assert objects("kuberc.yaml") == [
        {
            "apiVersion": "kubectl.config.k8s.io/v1beta1",
            "kind": "Preference",
            "defaults": [{"command": "patch", "options": [option]}],
        },
        {
            "apiVersion": "kubectl.config.k8s.io/v1alpha1",
            "kind": "Preference",
            "overrides": [{"command": "patch", "flags": [option]}],
        },
    ]
