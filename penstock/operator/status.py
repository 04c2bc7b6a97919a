"""Computes the status of a graph from its rendered services and the cluster's objects. Pure.

    state                pending, successful, or failed: the user has to change something
    observedGeneration   the generation of the graph's spec that the status describes
    conditions           Ready; Progressing, which is False when a roll cannot go on
    services             by service: kind and name of its object, and its replica counts
    ready                by role, "2/2": for the columns of `kubectl get dgd`

Shape and most reasons are those of Dynamo's operator, so that tools that read one read the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec

from penstock.kubernetes.api import Object, is_being_deleted, name_of
from penstock.operator.settings import RenderedService

ALL_READY = "all_resources_are_ready"
NOT_READY = "some_resources_are_not_ready"
INVALID = "manifest_is_invalid"
NOT_APPLIED = "failed_to_reconcile_the_resources"
STUCK = "roll_is_stuck"
ROLLING = "updating"
SETTLED = "up_to_date"
MISSING_API = "missing_api"

_HOPELESS = frozenset(
    [
        "CrashLoopBackOff",
        "CreateContainerConfigError",
        "CreateContainerError",
        "ErrImageNeverPull",
        "ErrImagePull",
        "ImagePullBackOff",
        "InvalidImageName",
        "RunContainerError",
        "StartError",
    ]
)
"""Reasons why a container waits that do not pass by themselves, or not soon."""

_STARTING = frozenset({"ContainerCreating", "PodInitializing"})
_MESSAGE_MAX = 1000
_TOLD_PODS = 3  # pods of a service whose trouble is reported; the others mostly have the same


class Trouble(msgspec.Struct, frozen=True):
    """Why a pod is not ready."""

    text: str
    is_hopeless: bool = False  # whether it lasts until the user changes something


class Observed(msgspec.Struct, frozen=True):
    """The result of reconciling a graph.

    services: the rendered services; for an invalid manifest those of the last valid one, if known.
    workloads, pods: the cluster's, by the name of a service's object.
    invalid: what is wrong with the manifest; then nothing was changed in the cluster.
    refused: why the API server refused an object.
    awaited: the object that must be deleted before one of its name can be created.
    """

    services: Sequence[RenderedService] = ()
    workloads: Mapping[str, Object] = {}
    pods: Mapping[str, Sequence[Object]] = {}
    invalid: str = ""
    refused: str = ""
    awaited: str = ""


def status_of(graph: Object, observed: Observed, now: datetime) -> Object:
    """The whole status. If nothing changed, it equals the graph's present status, times included."""
    before = graph.get("status") or {}
    counts = {service.name: _counts(service, observed) for service in observed.services}
    ready, reason, message = _ready(observed, counts)
    stuck = _stuck(observed)
    lacks_api = any(service.missing_api for service in observed.services)
    if observed.invalid or observed.refused or lacks_api or (stuck and not ready):
        state = "failed"
    else:
        state = "successful" if ready else "pending"
    if stuck:
        progress = (False, STUCK, stuck)
    else:
        progress = (True, SETTLED, "nothing is changing") if ready else (True, ROLLING, "pods are starting")
    generation = graph["metadata"].get("generation", 0)
    conditions = [
        _condition("Ready", ready, reason, message, before, generation, now),
        _condition("Progressing", *progress, before, generation, now),
    ]
    return {
        "state": state,
        "observedGeneration": generation,
        "conditions": conditions,
        # The services of an invalid manifest are unknown if this operator has not seen a valid one. And
        # server-side apply turns an object that loses its last field into null, which the schema forbids.
        "services": counts or before.get("services") or {},
        "ready": _by_role(observed.services, counts) or before.get("ready") or {},
    }


def trouble_of(pod: Object) -> Trouble | None:
    """Why this pod is not ready; None if it is ready."""
    status = pod.get("status") or {}
    conditions = {found["type"]: found for found in status.get("conditions") or ()}
    if conditions.get("Ready", {}).get("status") == "True":
        return None
    scheduled = conditions.get("PodScheduled", {})
    if scheduled.get("status") == "False":
        return Trouble(f"{scheduled.get('reason', 'Unschedulable')}: {scheduled.get('message', '')}")
    for container in (
        *(status.get("initContainerStatuses") or ()),
        *(status.get("containerStatuses") or ()),
    ):
        if trouble := _container_trouble(container):
            return trouble
    return Trouble(status.get("reason") or "starting")


def _container_trouble(container: Mapping[str, Any]) -> Trouble | None:
    waiting = (container.get("state") or {}).get("waiting") or {}
    reason = waiting.get("reason", "")
    ended = (container.get("state") or {}).get("terminated")
    ended = ended or (container.get("lastState") or {}).get("terminated") or {}
    if ended.get("exitCode"):
        said = " ".join((ended.get("message") or ended.get("reason") or "").split()[-60:])
        text = f"{reason or 'ended'}: exit code {ended['exitCode']}"
        return Trouble(f"{text}: {said}" if said else text, reason in _HOPELESS)
    if reason and reason not in _STARTING:
        said = waiting.get("message", "")
        return Trouble(f"{reason}: {said}" if said else reason, reason in _HOPELESS)
    return None


def _counts(service: RenderedService, observed: Observed) -> Object:
    """As Dynamo's status has them."""
    workload = observed.workloads.get(service.object_name) or {}
    status = workload.get("status") or {}
    ready = status.get("readyReplicas", 0)
    return {
        "componentKind": service.kind,
        "componentName": service.object_name,
        "replicas": status.get("replicas", 0),
        "updatedReplicas": status.get("updatedReplicas", 0),
        "readyReplicas": ready,
        "availableReplicas": status.get("availableReplicas", ready),
    }


def _ready(observed: Observed, counts: Mapping[str, Object]) -> tuple[bool, str, str]:
    """Whether all is as the manifest wants it, why, and in words."""
    if observed.invalid:
        return False, INVALID, observed.invalid
    if observed.refused:
        return False, NOT_APPLIED, observed.refused
    if observed.awaited:
        return False, NOT_READY, observed.awaited
    missing = [service for service in observed.services if service.missing_api]
    if missing:
        lines = [f"{service.name}: the cluster has no {service.missing_api}" for service in missing]
        return False, MISSING_API, "; ".join(lines)
    waiting = [
        f"{service.name}: {_waits(service, observed, counts[service.name])}"
        for service in observed.services
        if not _is_settled(service, observed, counts[service.name])
    ]
    if waiting:
        return False, NOT_READY, "; ".join(waiting)
    return True, ALL_READY, "all services are ready"


def _is_settled(service: RenderedService, observed: Observed, count: Object) -> bool:
    workload = observed.workloads.get(service.object_name)
    if workload is None:
        return False
    if service.replicas == 0:
        # Whether or not the Deployment's controller has come to it yet: there is nothing to wait for.
        pods = observed.pods.get(service.object_name, ())
        return count["replicas"] == 0 and all(is_being_deleted(pod) for pod in pods)
    status = workload.get("status") or {}
    return bool(
        status.get("observedGeneration", 0) >= workload["metadata"].get("generation", 0)
        and count["replicas"] == count["updatedReplicas"] == service.replicas
        and min(count["readyReplicas"], count["availableReplicas"]) >= service.replicas
    )


def _waits(service: RenderedService, observed: Observed, count: Object) -> str:
    text = f"{count.get('readyReplicas', 0)} of {service.replicas} ready"
    old = count.get("replicas", 0) - count.get("updatedReplicas", 0)
    if old > 0:
        text += f", {old} of an earlier generation"
    if failure := _failure(observed.workloads.get(service.object_name)):
        text += f", {failure}"
    troubles = list(_troubles(observed.pods.get(service.object_name, ())))
    told = [f"{name}: {trouble.text}" for name, trouble in troubles[:_TOLD_PODS]]
    if len(troubles) > _TOLD_PODS:
        told.append(f"{len(troubles) - _TOLD_PODS} more pods")
    return " (".join([text, ", ".join(told) + ")"]) if told else text


def _failure(workload: Object | None) -> str:
    """Why the cluster makes no pods: a quota, an account or a priority class that is not there."""
    for found in ((workload or {}).get("status") or {}).get("conditions") or ():
        if found["type"] == "ReplicaFailure" and found["status"] == "True":
            return str(found.get("message") or found.get("reason") or "")
    return ""


def _troubles(pods: Iterable[Object]) -> Iterable[tuple[str, Trouble]]:
    """The pods that are not ready, with the reasons; the hopeless ones first."""
    found = [(name_of(pod), trouble_of(pod)) for pod in pods if not is_being_deleted(pod)]
    troubles = [(name, trouble) for name, trouble in found if trouble is not None]
    return sorted(troubles, key=lambda pair: (not pair[1].is_hopeless, pair[0]))


def _stuck(observed: Observed) -> str:
    """Why a roll cannot go on; empty if it can."""
    reasons = []
    for service in observed.services:
        workload = observed.workloads.get(service.object_name)
        reasons += [
            f"{service.name}: {found.get('message', found.get('reason', ''))}"
            for found in ((workload or {}).get("status") or {}).get("conditions") or ()
            if found["type"] == "Progressing" and found["status"] == "False"
        ]
        hopeless = [
            f"{service.name}: {name}: {trouble.text}"
            for name, trouble in _troubles(observed.pods.get(service.object_name, ()))
            if trouble.is_hopeless
        ]
        if hopeless:
            serving = _serving(observed.pods[service.object_name])
            reasons.append(f"{hopeless[0]}; {serving} of its pods still serve" if serving else hopeless[0])
    return "; ".join(reasons)


def _serving(pods: Iterable[Object]) -> int:
    return sum(trouble_of(pod) is None for pod in pods)


def _by_role(services: Iterable[RenderedService], counts: Mapping[str, Object]) -> dict[str, str]:
    """Ready and wanted replicas of each role, summed over its services."""
    sums: dict[str, list[int]] = {}
    for service in services:
        both = sums.setdefault(service.role, [0, 0])
        both[0] += counts[service.name].get("readyReplicas", 0)
        both[1] += service.replicas
    return {role: f"{ready}/{wanted}" for role, (ready, wanted) in sums.items()}


def _condition(
    kind: str, holds: bool, reason: str, message: str, before: Object, generation: int, now: datetime
) -> Object:
    """A condition. Its transition time is kept if its status has not changed."""
    status = "True" if holds else "False"
    since = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    for found in before.get("conditions") or ():
        if found.get("type") == kind and found.get("status") == status:
            since = found.get("lastTransitionTime", since)
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": message if len(message) <= _MESSAGE_MAX else message[: _MESSAGE_MAX - 3] + "...",
        "observedGeneration": generation,
        "lastTransitionTime": since,
    }
