"""Renders the pod template of a service, around the container `main`."""

from __future__ import annotations

from typing import Any

from penstock.kubernetes.api import Object
from penstock.operator import names
from penstock.operator.rendering.containers import (
    claim_mounts,
    grace_period_s,
    main_container,
    shared_memory_size,
    writes_anywhere,
)
from penstock.operator.rendering.merge import merged
from penstock.operator.rendering.security import pod_security, pod_security_with
from penstock.operator.rendering.service_plan import ServicePlan
from penstock.operator.settings import RenderSettings
from penstock.shapes import Role

_PAIR = (Role.PREFILL.value, Role.DECODE.value)
_NEAR_WEIGHT = 50  # of 100: less than what a user prefers by a weight of 100

_NAMES_OF_OBJECTS = (names.SELECTOR, names.DISCOVERED_BY, names.GRAPH_NAME, "app.kubernetes.io/managed-by")
"""Labels by which the operator and the frontends find pods. A manifest cannot change them."""


def pod_template(plan: ServicePlan, settings: RenderSettings, roles: tuple[str, ...]) -> Object:
    """The pod template of a Deployment, or of the leader in a LeaderWorkerSet.

    Args:
        roles: the roles that the graph has.
    """
    spec = merged(_pod_spec(plan, settings, roles), plan.pod_spec)
    for kind in ("initContainers", "containers"):
        if kind in spec:
            spec[kind] = [_with_protocols(container) for container in spec[kind]]
    spec["securityContext"] = pod_security_with(
        spec["securityContext"],
        plan.pod_spec.get("securityContext") or {},
        plan.container.get("securityContext") or {},
    )
    needed_s = grace_period_s(plan, settings)
    spec["terminationGracePeriodSeconds"] = max(
        needed_s, plan.pod_spec.get("terminationGracePeriodSeconds") or 0
    )
    metadata: Object = {"labels": pod_labels(plan)}
    if annotations := pod_annotations(plan):
        metadata["annotations"] = annotations
    return {"metadata": metadata, "spec": spec}


def pod_labels(plan: ServicePlan) -> dict[str, str]:
    """The labels of a pod. The manifest's override the operator's, except those by which pods are found."""
    graph = plan.graph.name
    labels = {
        **names.common_labels(graph, plan.role),
        "app": graph,
        "role": plan.role,
        names.SELECTOR: plan.object_name,
        names.DISCOVERED_BY: graph,
        "nvidia.com/dynamo-component": plan.name,
        "nvidia.com/dynamo-component-type": plan.component_type,
        "nvidia.com/dynamo-namespace": plan.graph.namespace,
        "nvidia.com/metrics-enabled": "true",
    }
    if not plan.reports_metrics:
        del labels["nvidia.com/metrics-enabled"]
    own = plan.labels | (plan.spec.extra_pod_metadata.labels if plan.spec.extra_pod_metadata else {})
    return labels | {label: value for label, value in own.items() if label not in _NAMES_OF_OBJECTS}


def reserved_labels(plan: ServicePlan) -> list[str]:
    """The manifest's labels that have no effect."""
    own = plan.labels | (plan.spec.extra_pod_metadata.labels if plan.spec.extra_pod_metadata else {})
    return [label for label in own if label in _NAMES_OF_OBJECTS]


def pod_annotations(plan: ServicePlan) -> dict[str, str]:
    """The manifest's annotations without those for the operator, and the annotation that a restart
    changes."""
    pods = plan.spec.extra_pod_metadata
    own = plan.annotations | (pods.annotations if pods else {})
    annotations = {
        name: value for name, value in own.items() if not name.startswith(names.OPERATORS_PREFIXES)
    }
    return annotations | ({names.RESTARTED: plan.restart_id} if plan.restart_id else {})


def _pod_spec(plan: ServicePlan, settings: RenderSettings, roles: tuple[str, ...]) -> Object:
    spec: Object = {
        "containers": [main_container(plan, settings)],
        "volumes": _volumes(plan, settings),
        "securityContext": pod_security(),
        # A Service called "vllm" would set VLLM_PORT in every pod, and vLLM would use it.
        "enableServiceLinks": False,
        "automountServiceAccountToken": plan.discovers_by_api,
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": plan.selector()},
            }
        ],
    }
    if plan.discovers_by_api:
        spec["serviceAccountName"] = names.frontend_account(plan.graph.name)
    if settings.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in settings.image_pull_secrets]
    if plan.role in _PAIR and all(role in roles for role in _PAIR):
        spec["affinity"] = {"podAffinity": _near_partners(plan)}
    if plan.priority_class_name:
        spec["priorityClassName"] = plan.priority_class_name
    return spec


def _with_protocols(container: Object) -> Object:
    """The container with a protocol at each port. Server-side apply distinguishes ports by it, and
    Kubernetes before 1.21 refuses ports without one."""
    if not container.get("ports"):
        return container
    return container | {
        "ports": [{**port, "protocol": port.get("protocol", "TCP")} for port in container["ports"]]
    }


def _near_partners(plan: ServicePlan) -> Object:
    """Have prefill and decode workers prefer the same topology domain, for faster KV transfers."""
    return {
        "preferredDuringSchedulingIgnoredDuringExecution": [
            {
                "weight": _NEAR_WEIGHT,
                "podAffinityTerm": {
                    "topologyKey": plan.topology_key,
                    "labelSelector": {
                        "matchLabels": {names.DISCOVERED_BY: plan.graph.name},
                        "matchExpressions": [{"key": "role", "operator": "In", "values": list(_PAIR)}],
                    },
                },
            }
        ]
    }


def _volumes(plan: ServicePlan, settings: RenderSettings) -> list[Object]:
    side = "frontend" if plan.is_frontend else "worker"
    volumes: list[dict[str, Any]] = [{"name": names.HOME_VOLUME, "emptyDir": {}}]
    if not writes_anywhere(plan):
        volumes.append({"name": names.TEMPORARY_VOLUME, "emptyDir": {}})
    volumes.append(
        {
            "name": names.LINK_VOLUME,
            "secret": {"secretName": names.link_secret(plan.graph.name, side), "defaultMode": 0o440},
        }
    )
    if size := shared_memory_size(plan, settings.shared_memory):
        volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": size}})
    volumes += [
        {"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim in claim_mounts(plan)
    ]
    return volumes
