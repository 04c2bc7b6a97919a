"""What rendering is told besides the manifest, and what it answers."""

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
    """The operator's settings that show in objects."""

    image: str
    """For containers whose command was Dynamo's, those without an image, and log relays."""

    image_pull_policy: Literal["", "Always", "IfNotPresent", "Never"] = ""
    """Where the manifest gives none; empty: the cluster's default."""

    image_pull_secrets: tuple[str, ...] = ()
    """Added to every pod, for the operator's image."""

    drain_s: float = 180.0
    """Seconds that running requests get to end, where the manifest does not say: longer than nearly all
    generations. A pod that has none ends at once."""

    grace_slack_s: float = 15.0
    """Between the end of a drain and the kubelet's SIGKILL, in seconds: closing links and the engine."""

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
    """Something that its user should know of a graph that runs."""

    reason: str  # CamelCase, for events and conditions
    message: str  # one line
    service: str = ""  # empty: the whole graph


class RenderedService(msgspec.Struct, frozen=True):
    """What status needs to know of a service."""

    name: str  # its key in the manifest
    component_type: str
    role: str  # frontend, prefill, decode or aggregated
    kind: str  # Deployment or LeaderWorkerSet
    object_name: str
    replicas: int
    nodes: int = 1  # pods of one replica
    missing_api: str = ""  # what the cluster lacks, so that the object is not among `objects`


class Desired(msgspec.Struct, frozen=True):
    """What a graph should have. Objects are without ownerReferences: the reconciler adds them."""

    objects: tuple[Object, ...]
    """To be applied, in this order."""

    adapters: tuple[Object, ...]
    """Scaling adapters. To be created where they are missing, and else left alone but for their labels:
    their `spec.replicas` belongs to whoever scales."""

    services: tuple[RenderedService, ...]
    notes: tuple[Note, ...]
    roles: tuple[str, ...]
    """frontend, prefill, decode or aggregated: those that the graph has, in the order of a request."""
