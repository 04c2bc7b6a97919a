"""deploy/ on a real cluster: the scripts from nothing to an answer and back, and the operator's rights."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from checks.kubernetes.cluster.places import CHECKOUT
from checks.kubernetes.graphs import Images
from checks.kubernetes.kubectl import Kubectl

DEPLOY = CHECKOUT / "deploy"
GRAPHS = "dynamographdeployments.nvidia.com"
ADAPTERS = "dynamographdeploymentscalingadapters.nvidia.com"
SCRIPT_S = 600.0
ON_CPUS = ("--engine", "reference", "--model", "/models/tiny")


class Scripts:
    """deploy/'s scripts, against the cluster and namespace of a kubectl."""

    def __init__(self, kubectl: Kubectl, images: Images, tools: Path) -> None:
        (tools / "kubectl").symlink_to(kubectl.program)
        self._environment = {
            **os.environ,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "HOME": str(tools),
            "KUBECONFIG": kubectl.kubeconfig,
            "NAMESPACE": kubectl.namespace,
            "PENSTOCK_IMAGE": images.penstock,
            "PENSTOCK_OPERATOR_IMAGE": images.penstock,
        }

    def run(self, name: str, *arguments: str, folder: Path = DEPLOY) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [f"./{name}", *arguments],
            cwd=folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SCRIPT_S,
            check=False,
        )

    def __call__(self, name: str, *arguments: str) -> str:
        done = self.run(name, *arguments)
        assert done.returncode == 0, f"{name} ended with {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture
def scripts(kubectl: Kubectl, images: Images, tmp_path: Path) -> Iterator[Scripts]:
    """Whatever a test leaves in its namespace is removed: an operator must not outlive its test."""
    found = Scripts(kubectl, images, tmp_path)
    yield found
    found("cleanup.sh", "--operator", "--yes")


def crds(kubectl: Kubectl) -> set[str]:
    return {item["metadata"]["name"] for item in kubectl.items("crds")} & {GRAPHS, ADAPTERS}


def test_from_an_empty_namespace_to_an_answer_and_back(kubectl: Kubectl, scripts: Scripts) -> None:
    there_before = crds(kubectl)
    planned = scripts("deploy.sh", "multinode-vllm", *ON_CPUS, "--dry-run")
    assert "Nothing was changed" in planned
    assert kubectl.items("deployments") == []
    assert crds(kubectl) == there_before

    told = scripts("deploy.sh", "multinode-vllm", *ON_CPUS, "--timeout", "300")
    assert f"READY: multinode-vllm in {kubectl.namespace}" in told
    assert len(kubectl.items("pods", "-l", "app=multinode-vllm")) == 5
    tested = scripts("test.sh", "multinode-vllm")
    assert "Alice" in tested
    assert "PASSED" in tested

    again = scripts("deploy.sh", "multinode-vllm", *ON_CPUS, "--timeout", "300")
    assert "Nothing is missing." in again

    # Kinds take the graphs of all namespaces with them: only when this test brought them.
    how = "--operator" if there_before else "--all"
    scripts("cleanup.sh", how, "--yes")
    if not there_before:
        assert crds(kubectl) == set()
    for kind in ("deployments", "services", "networkpolicies", "roles", "rolebindings", "leases"):
        assert kubectl.items(kind) == [], kind
    for kind in ("clusterroles", "clusterrolebindings"):
        assert not [
            item for item in kubectl.items(kind) if item["metadata"]["name"].startswith(kubectl.namespace)
        ]


def test_a_graph_that_cannot_start_ends_the_script_with_the_reason(
    kubectl: Kubectl, scripts: Scripts, tmp_path: Path
) -> None:
    graph = yaml.safe_load((DEPLOY / "local.yaml").read_text())
    graph["spec"]["services"]["DecodeWorker"]["replicaz"] = 2
    manifest = tmp_path / "wrong.yaml"
    manifest.write_text("# A graph with a typing error.\n" + yaml.safe_dump(graph))
    done = scripts.run("deploy.sh", str(manifest), "--timeout", "60")
    assert done.returncode == 1
    # kubectl finds it by the schema; where it does not, the operator does.
    assert "replicaz" in done.stdout + done.stderr
    assert "FAILED" in done.stderr


RBAC = "rbac.authorization.k8s.io"
EXTENSIONS = "apiextensions.k8s.io"
# What the operator's account may do: verb, group, resource, subresource, name, allowed.
RIGHTS = [
    ("create", "apps", "deployments", "", "", True),
    ("patch", "", "secrets", "", "", True),
    ("create", RBAC, "roles", "", "", True),
    ("get", "", "pods", "log", "", True),
    ("patch", "nvidia.com", "dynamographdeployments", "status", "", True),
    ("patch", EXTENSIONS, "customresourcedefinitions", "", GRAPHS, True),
    ("delete", "", "pods", "", "", False),
    ("create", "", "pods", "", "", False),
    ("create", "", "pods", "exec", "", False),
    ("delete", "nvidia.com", "dynamographdeployments", "", "", False),
    ("patch", "nvidia.com", "dynamographdeployments", "", "", False),
    ("delete", EXTENSIONS, "customresourcedefinitions", "", GRAPHS, False),
    ("patch", EXTENSIONS, "customresourcedefinitions", "", "others.example.com", False),
    ("create", RBAC, "clusterroles", "", "", False),
    ("list", "", "nodes", "", "", False),
]


def may(kubectl: Kubectl, namespace: str, verb: str, group: str, resource: str, *rest: str) -> bool:
    """What the API server says of the operator's account, in `namespace`."""
    subresource, name = rest
    attributes = {
        "namespace": namespace,
        "verb": verb,
        "group": group,
        "resource": resource,
        "subresource": subresource,
        "name": name,
    }
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {
            "user": f"system:serviceaccount:{kubectl.namespace}:penstock-operator",
            "resourceAttributes": attributes,
        },
    }
    answer = kubectl("create", "-f", "-", "-o", "jsonpath={.status.allowed}", stdin=json.dumps(review))
    return answer == "true"


def test_the_operators_account_may_do_its_work_and_no_more(kubectl: Kubectl, scripts: Scripts) -> None:
    manifest = (DEPLOY / "kubernetes/namespaced/operator.yaml").read_text()
    objects = yaml.safe_load_all(manifest.replace("dynamo-cloud", kubectl.namespace))
    kubectl.apply(*(item for item in objects if item["kind"] != "Deployment"))
    told = [(*asked, may(kubectl, kubectl.namespace, *asked)) for *asked, _ in RIGHTS]
    assert told == RIGHTS
    # Another namespace is none of its business.
    assert not may(kubectl, "default", "list", "", "secrets", "", "")
    account = f"--as=system:serviceaccount:{kubectl.namespace}:penstock-operator"
    # It may give others what it may do itself, and nothing else.
    for resource, made in (("pods", True), ("pods/exec", False)):
        name = f"try-{resource.replace('/', '-')}"
        given = ("--verb=get", f"--resource={resource}", account)
        assert (kubectl.run("create", "role", name, *given).returncode == 0) is made
