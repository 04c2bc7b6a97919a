"""Renders the objects that keep a service's pods running: Deployments, LeaderWorkerSets and
PodDisruptionBudgets."""

from __future__ import annotations

import re

from penstock.errors import ConfigError
from penstock.kubernetes.api import Kind, Object
from penstock.kubernetes.kinds import DEPLOYMENTS, LEADER_WORKER_SETS
from penstock.operator import names
from penstock.operator.rendering.multinode import follower_template
from penstock.operator.rendering.pods import pod_template
from penstock.operator.rendering.service_plan import ServicePlan
from penstock.operator.settings import RenderSettings

_AMOUNT = re.compile(r"\d+%?", re.ASCII)
_STRATEGIES: dict[str, tuple[str, str] | None] = {
    "": ("25%", "25%"),
    "RollingUpdate": ("25%", "25%"),
    "RampedSlowRollout": ("1", "0"),
    "BestEffortControlledRollout": ("0", "20%"),
    "Recreate": None,
}
"""By the value of the annotation, as the manifest API defines them: maxSurge and maxUnavailable."""

_LEADERS = {"leaderworkerset.sigs.k8s.io/worker-index": "0"}
_REVISIONS_KEPT = 3  # for `kubectl rollout undo`; rather apply the earlier manifest


def deployment(
    plan: ServicePlan, settings: RenderSettings, roles: tuple[str, ...], strategy: Object
) -> Object:
    """The Deployment of a service whose replicas are single pods."""
    spec: Object = {
        "replicas": plan.replicas,
        "selector": {"matchLabels": plan.selector()},
        "strategy": strategy,
        "progressDeadlineSeconds": settings.progress_deadline_s,
        "revisionHistoryLimit": _REVISIONS_KEPT,
        "template": pod_template(plan, settings, roles),
    }
    if not plan.is_frontend:
        spec["minReadySeconds"] = settings.worker_min_ready_s
    return {
        "apiVersion": DEPLOYMENTS.api_version,
        "kind": DEPLOYMENTS.name,
        "metadata": metadata(plan),
        "spec": spec,
    }


def leader_worker_set(plan: ServicePlan, settings: RenderSettings, roles: tuple[str, ...]) -> Object:
    """The LeaderWorkerSet of a service whose replicas are groups of pods, one pod on each node."""
    leader = pod_template(plan, settings, roles)
    return {
        "apiVersion": LEADER_WORKER_SETS.api_version,
        "kind": LEADER_WORKER_SETS.name,
        "metadata": metadata(plan),
        "spec": {
            "replicas": plan.replicas,
            "startupPolicy": "LeaderCreated",
            "rolloutStrategy": {
                "type": "RollingUpdate",
                "rollingUpdateConfiguration": {"maxUnavailable": 1, "maxSurge": 0},
            },
            "leaderWorkerTemplate": {
                "size": plan.nodes,
                # vLLM's processes cannot be replaced one by one.
                "restartPolicy": "RecreateGroupOnPodRestart",
                "leaderTemplate": leader,
                "workerTemplate": follower_template(plan, leader),
            },
        },
    }


def disruption_budget(plan: ServicePlan, kind: Kind) -> Object:
    """A budget that lets Kubernetes drain nodes one replica at a time. Only for services with several
    replicas: with one replica it would block the drain of its node for ever."""
    leaders = _LEADERS if plan.nodes > 1 else {}
    return {
        "apiVersion": kind.api_version,
        "kind": kind.name,
        "metadata": metadata(plan),
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": plan.selector() | leaders}},
    }


def metadata(plan: ServicePlan) -> Object:
    """The metadata of an object of a service."""
    labels = plan.labels | names.common_labels(plan.graph.name, plan.role) | plan.selector()
    found: Object = {"name": plan.object_name, "labels": labels}
    annotations = {
        name: value
        for name, value in plan.annotations.items()
        if not name.startswith(names.OPERATORS_PREFIXES)
    }
    return found | ({"annotations": annotations} if annotations else {})


def rollout_strategy(kind: str, max_surge: str, max_unavailable: str) -> Object:
    """A Deployment's strategy, from three annotations.

    Raises:
        ConfigError: one of them is invalid.
    """
    if kind not in _STRATEGIES:
        known = ", ".join(filter(None, _STRATEGIES))
        raise ConfigError(f"annotation {names.STRATEGY}: expected one of {known}, got {kind!r}")
    amounts = _STRATEGIES[kind]
    if amounts is None:
        return {"type": "Recreate"}
    surge = _amount(names.MAX_SURGE, max_surge or amounts[0])
    unavailable = _amount(names.MAX_UNAVAILABLE, max_unavailable or amounts[1])
    if {surge, unavailable} <= {0, "0%"}:
        raise ConfigError(f"annotations {names.MAX_SURGE} and {names.MAX_UNAVAILABLE}: both are 0")
    return {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable},
    }


def _amount(annotation: str, text: str) -> int | str:
    if not _AMOUNT.fullmatch(text):
        raise ConfigError(f"annotation {annotation}: expected a number or a percentage, got {text!r}")
    return text if text.endswith("%") else int(text)
