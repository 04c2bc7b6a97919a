"""The input of rendering, besides the manifest, and its output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from penstock.kubernetes.api import Kind, Object
from penstock.kubernetes.kinds import (
    DISRUPTION_BUDGETS,
    DISRUPTION_BUDGETS_BETA,
    INGRESSES,
    LEADER_WORKER_SETS,
)

OPTIONAL_KINDS = (INGRESSES, DISRUPTION_BUDGETS, DISRUPTION_BUDGETS_BETA, LEADER_WORKER_SETS)
"""Kinds that not every cluster serves. Of two versions of a kind the newer comes first."""


class RenderSettings(msgspec.Struct, frozen=True):
    """The operator's settings that affect the objects of graphs."""

    image: str
    """Image for containers whose command was Dynamo's, for those without an image, and for log relays."""

    image_pull_policy: Literal["", "Always", "IfNotPresent", "Never"] = ""
    """Used where the manifest sets no pull policy. Empty: the cluster's default."""

    image_pull_secrets: tuple[str, ...] = ()
    """Pull secrets for the operator's image, added to every pod."""

    drain_s: float = 180.0
    """Time in which running requests may end when a pod stops, in seconds; used where the manifest does not
    set it. Longer than nearly all generations take. A pod without requests stops at once."""

    grace_slack_s: float = 15.0
    """Time from the end of a drain to the kubelet's SIGKILL, in seconds, for closing links and engine."""

    pre_stop_s: int = 5
    """Between a frontend's removal from its Service and its SIGTERM, in seconds: kube-proxy on each node
    needs a moment to stop sending it new connections."""

    worker_min_ready_s: int = 5
    """For which a new worker must be ready before a roll goes on, in seconds: frontends connect to it in
    this time, so that an old worker does not leave before its successor takes requests."""

    progress_deadline_s: int = 3 * 3600
    """After which a roll counts as failed, in seconds. A large model may have to be downloaded first, for
    which the startup probe allows two hours; after it come loading and compiling."""

    shared_memory: str = "8Gi"
    """The most that /dev/shm holds in pods of engines on GPUs."""

    topology_key: str = "topology.kubernetes.io/zone"
    """The label of nodes between which KV moves cheaply if they have the same value."""


class ClusterFacts(msgspec.Struct, frozen=True):
    """What rendering must know about the cluster."""

    served: frozenset[Kind] = frozenset()
    """Those of OPTIONAL_KINDS that the cluster serves."""

    adapter_replicas: Mapping[str, int] = {}
    """By service: `spec.replicas` of its scaling adapter, where there is one."""

    @property
    def disruption_budgets(self) -> Kind | None:
        """The newest version of PodDisruptionBudgets that the cluster serves; None when it serves none."""
        versions = (DISRUPTION_BUDGETS, DISRUPTION_BUDGETS_BETA)
        return next((kind for kind in versions if kind in self.served), None)


class Note(msgspec.Struct, frozen=True):
    """Something that the user of a running graph should know."""

    reason: str  # CamelCase, for events and conditions
    message: str  # one line
    service: str = ""  # empty: the whole graph


class RenderedService(msgspec.Struct, frozen=True):
    """A rendered service, as far as the status needs to know it."""

    name: str  # its key in the manifest
    component_type: str
    role: str  # frontend, prefill, decode or aggregated
    kind: str  # Deployment or LeaderWorkerSet
    object_name: str
    replicas: int
    nodes: int = 1  # pods of one replica
    missing_api: str = ""  # the kind that the cluster does not serve; then the object is not in `objects`


class Desired(msgspec.Struct, frozen=True):
    """The objects that a graph should have. The reconciler adds their ownerReferences."""

    objects: tuple[Object, ...]
    """Objects to apply, in this order."""

    adapters: tuple[Object, ...]
    """Scaling adapters. Missing ones are created; existing ones are left alone except for their labels,
    since the user or an autoscaler sets their `spec.replicas`."""

    services: tuple[RenderedService, ...]
    notes: tuple[Note, ...]
    roles: tuple[str, ...]
    """frontend, prefill, decode or aggregated: those that the graph has, in the order of a request."""
