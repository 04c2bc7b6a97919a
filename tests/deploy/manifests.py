"""deploy/ as tests read it: its objects, and what NetworkPolicies among them allow."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from penstock.kubernetes.kinds import LEADER_WORKER_SETS
from penstock.operator.rendering.desired import desired
from penstock.operator.settings import ClusterFacts, RenderSettings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
PLAIN = DEPLOY / "kubernetes"
SCOPES = ("namespaced", "cluster-wide")


def documents(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(text) if document is not None]


def objects(path: str) -> list[dict[str, Any]]:
    """Those of a file in deploy/."""
    return documents((DEPLOY / path).read_text(encoding="utf-8"))


def of_kind(found: Iterable[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    """Those of one kind, by name."""
    return {item["metadata"]["name"]: item for item in found if item["kind"] == kind}


def matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector of Kubernetes selects these labels."""
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for expression in selector.get("matchExpressions", ()):
        value, values = labels.get(expression["key"]), expression.get("values", ())
        holds = {
            "In": value in values,
            "NotIn": value not in values,
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }
        if not holds[expression["operator"]]:
            return False
    return True


def allows(
    policies: Iterable[Mapping[str, Any]],
    to: Mapping[str, str],
    port: int,
    source: Mapping[str, str] | None,
) -> bool:
    """Whether NetworkPolicies of one namespace let `source` connect to a pod with the labels `to`.

    `source` has the labels of a pod of that namespace, or is None: somebody outside of it.
    """
    selecting = [policy["spec"] for policy in policies if matches(policy["spec"]["podSelector"], to)]
    if not selecting:
        return True
    for rule in (rule for spec in selecting for rule in spec.get("ingress", ())):
        from_here = "from" not in rule or any(
            source is not None and matches(peer["podSelector"], source) for peer in rule["from"]
        )
        if from_here and ("ports" not in rule or port in [entry["port"] for entry in rule["ports"]]):
            return True
    return False


@functools.cache
def pods(graph: str) -> dict[str, dict[str, Any]]:
    """Pod templates of the operator's, by the role of what runs in them, and `follower`."""
    worker = {"componentType": "worker", "extraPodSpec": {"mainContainer": {}}}
    main = ["penstock", "worker", "--engine", "vllm", "--model", "m", "--role"]
    services: dict[str, Any] = {"Frontend": {"componentType": "frontend"}}
    for role in ("prefill", "decode"):
        services[role] = worker | {"extraPodSpec": {"mainContainer": {"command": [*main, role]}}}
    services["decode"]["multinode"] = {"nodeCount": 2}
    manifest = {
        "apiVersion": "nvidia.com/v1alpha1",
        "kind": "DynamoGraphDeployment",
        "metadata": {"name": graph, "namespace": "ns"},
        "spec": {"services": services},
    }
    facts = ClusterFacts(served=frozenset({LEADER_WORKER_SETS}))
    rendered = desired(manifest, RenderSettings(image="i"), facts).objects
    found = {}
    for item in rendered:
        if item["kind"] == "Deployment":
            found[item["spec"]["template"]["metadata"]["labels"]["role"]] = item["spec"]["template"]
        elif item["kind"] == "LeaderWorkerSet":
            template = item["spec"]["leaderWorkerTemplate"]
            found |= {"decode": template["leaderTemplate"], "follower": template["workerTemplate"]}
    return found


def pod_labels(graph: str, role: str) -> dict[str, str]:
    """Those by which policies and monitors know a pod of a graph."""
    labels: dict[str, str] = pods(graph)[role]["metadata"]["labels"]
    return labels


OPERATOR = {"app.kubernetes.io/name": "penstock-operator"}

# Who may connect to what, by the policies for all graphs of a namespace: source, role, port, allowed.
CONNECTIONS: list[tuple[dict[str, str] | None, str, int, bool]] = [
    (None, "frontend", 8000, True),
    (None, "frontend", 7000, False),
    ({"app": "somebody"}, "frontend", 8000, True),
    (None, "decode", 7000, False),
    (None, "decode", 9090, False),
    ({"app": "somebody"}, "prefill", 7100, False),
    (pod_labels("mine", "frontend"), "decode", 7000, True),
    (pod_labels("mine", "follower"), "decode", 29500, True),
    (pod_labels("mine", "decode"), "prefill", 7100, True),
    (pod_labels("mine", "decode"), "prefill", 45001, True),  # UCX chooses its ports
    (pod_labels("mine", "decode"), "follower", 45001, True),
    (None, "follower", 29500, False),
    (pod_labels("mine", "decode"), "frontend", 9999, False),
    ({"app.kubernetes.io/name": "prometheus"}, "prefill", 9090, True),  # it scrapes /metrics
    (OPERATOR, "prefill", 9090, True),  # it asks which workers are idle
    (OPERATOR, "decode", 7000, False),
]
