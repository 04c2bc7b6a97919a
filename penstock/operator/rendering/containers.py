"""Renders the container `main` of a pod: command, environment, ports, probes and security context."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from penstock.graph.container_command import unresolved_reference
from penstock.graph.manifest import Env
from penstock.graph.placeholders import for_kubelet, has_placeholder
from penstock.kubernetes.api import Object
from penstock.operator import names
from penstock.operator.rendering.merge import merged
from penstock.operator.rendering.resources import own_resources, resources
from penstock.operator.rendering.security import container_security, container_security_with
from penstock.operator.rendering.service_plan import ServicePlan
from penstock.operator.settings import RenderSettings

_LIVE, _HEALTH = "/live", "/health"
_COMPILATION_CACHE = f"{names.HOME}/.cache/vllm"

_CATCHES_SIGTERM = "until grep -q '^SigCgt:.[0-9a-f]\\{12\\}[4-7c-f]' /proc/1/status; do sleep 0.1; done"
"""Ends once the container's first process has a handler for SIGTERM: signal 15 is bit 14 of Linux's mask of
caught signals."""

# The operator sets these fields; a manifest cannot.
_OPERATORS = ("name", "command", "args", "image", "env", "workingDir")


def main_container(plan: ServicePlan, settings: RenderSettings) -> Object:
    """The container. Its process 1 is Penstock, so that SIGTERM begins the drain."""
    container: Object = {
        "name": names.MAIN,
        "image": plan.image,
        **({"imagePullPolicy": settings.image_pull_policy} if settings.image_pull_policy else {}),
        "command": ["penstock"],
        "args": list(plan.args),
        "env": environment(plan),
        **_environment_sources(plan),
        "ports": _ports(plan),
        **_probes(plan),
        **_lifecycle(plan, settings),
        "resources": resources(plan),
        "securityContext": container_security(writes_anywhere=writes_anywhere(plan)),
        # The last output of a failed process appears in the pod's status, and from there in the graph's.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": volume_mounts(plan),
    }
    own = {field: value for field, value in plan.container.items() if field not in _OPERATORS}
    if "resources" in own:
        own["resources"] = own_resources(plan)
    if plan.keeps_image and plan.container.get("workingDir"):
        own["workingDir"] = plan.container["workingDir"]
    result = merged(container, own)
    wishes = own.get("securityContext") or {}
    result["securityContext"] = container_security_with(result["securityContext"], wishes)
    return {field: value for field, value in result.items() if value not in ([], {})}


# --- environment --------------------------------------------------------------------------------------


def environment(plan: ServicePlan) -> list[Object]:
    """The pod's own variables, then those of graph, service and container, then those that a shell script
    sets.

    Each name occurs once, as the API requires: with its last value, at its first position. So variables
    that refer to it come after it.
    """
    variables: dict[str, Object] = {
        name: {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}
        for name, path in names.POD_VARIABLES.items()
    }
    # torch reads the user's name from USER if the image's /etc/passwd has no entry for the user.
    for name, value in (("HOME", names.HOME), ("USER", names.USER)):
        variables[name] = {"name": name, "value": value}
    if cache := _compilation_cache(plan):
        variables["VLLM_CACHE_ROOT"] = {"name": "VLLM_CACHE_ROOT", "value": cache}
    own = plan.container.get("env") or []
    for entry in (*plan.graph_env, *plan.spec.envs):
        variables[entry.name] = _variable(plan, entry.name, _entry(entry))
    for raw in own:
        variables[raw["name"]] = _variable(plan, raw["name"], raw)
    for name, value in plan.service.env.items():
        if name not in variables and not has_placeholder(value):
            variables[name] = {"name": name, "value": for_kubelet(value)}
    return list(variables.values())


def _entry(entry: Env) -> Object:
    if entry.value_from is not None:
        return {"name": entry.name, "valueFrom": entry.value_from}
    return {"name": entry.name, "value": entry.value or ""}


def _variable(plan: ServicePlan, name: str, raw: Mapping[str, Any]) -> Object:
    """The variable as written, unless its value changed: it was set again, or a shell script set it."""
    value = plan.service.env.get(name)
    if raw.get("valueFrom") is not None or value is None or unresolved_reference(value):
        return {field: item for field, item in raw.items() if item is not None}
    return {"name": name, "value": for_kubelet(value)}


def _environment_sources(plan: ServicePlan) -> Object:
    secret = plan.spec.env_from_secret
    return {"envFrom": [{"secretRef": {"name": secret}}]} if secret else {}


# --- ports, probes, the end ---------------------------------------------------------------------------


def _ports(plan: ServicePlan) -> list[Object]:
    if plan.is_frontend:
        return [_port(plan.frontend_options.http_port, names.HTTP_PORT_NAME)]
    ports = [_port(names.LINK_PORT, names.LINK_PORT_NAME), _port(names.KV_PORT, names.KV_PORT_NAME)]
    if plan.system_port > 0:
        ports.append(_port(plan.system_port, names.SYSTEM_PORT_NAME))
    return ports


def _port(number: int, name: str) -> Object:
    return {"containerPort": number, "name": name, "protocol": "TCP"}


def _probes(plan: ServicePlan) -> Object:
    """The manifest API's default probes, with two changes. They are checked more often, so that a pod
    counts as ready sooner. And liveness tolerates more failures, so that a busy process is not killed."""
    if plan.is_frontend:
        scheme = "HTTPS" if plan.frontend_options.http_tls_cert else ""
        defaults = {
            "livenessProbe": _probe(names.HTTP_PORT_NAME, _LIVE, 10, 5, 6, scheme),
            "readinessProbe": _probe(names.HTTP_PORT_NAME, _HEALTH, 5, 4, 3, scheme),
            "startupProbe": _probe(names.HTTP_PORT_NAME, _LIVE, 2, 2, 150, scheme),  # 5 minutes
        }
    elif plan.system_port > 0:
        defaults = {
            "livenessProbe": _probe(names.SYSTEM_PORT_NAME, _LIVE, 5, 4, 6),
            "readinessProbe": _probe(names.SYSTEM_PORT_NAME, _HEALTH, 5, 4, 3),
            "startupProbe": _probe(names.SYSTEM_PORT_NAME, _LIVE, 2, 2, 3600),  # 2 hours
        }
    else:
        defaults = {}
    given = {"livenessProbe": plan.spec.liveness_probe, "readinessProbe": plan.spec.readiness_probe}
    return defaults | {name: probe for name, probe in given.items() if probe is not None}


def _probe(port: str, path: str, period_s: int, timeout_s: int, failures: int, scheme: str = "") -> Object:
    request = {"path": path, "port": port} | ({"scheme": scheme} if scheme else {})
    return {
        "httpGet": request,
        "periodSeconds": period_s,
        "timeoutSeconds": timeout_s,
        "failureThreshold": failures,
    }


def _lifecycle(plan: ServicePlan, settings: RenderSettings) -> Object:
    """What delays SIGTERM. Linux does not deliver it to a first process that has no handler yet, and the
    kubelet sends it once: a worker that is deleted while Python starts would stay for its grace period."""
    if plan.is_frontend and settings.pre_stop_s > 0:
        command = ["sleep", str(settings.pre_stop_s)]
    else:
        command = ["sh", "-c", _CATCHES_SIGTERM]
    return {"lifecycle": {"preStop": {"exec": {"command": command}}}}


def grace_period_s(plan: ServicePlan, settings: RenderSettings) -> int:
    """Seconds from the deletion of a pod to SIGKILL. In that time it drains, and keeps KV for its
    readers."""
    kept_s = settings.pre_stop_s if plan.is_frontend else plan.worker_options.handoff_ttl_s
    return math.ceil(plan.options.drain_s + kept_s + settings.grace_slack_s)


# --- where it writes --------------------------------------------------------------


def writes_anywhere(plan: ServicePlan) -> bool:
    """Whether the container may write anywhere. vLLM, torch and CUDA write caches to various folders."""
    return plan.needs_gpu_stack


def volume_mounts(plan: ServicePlan) -> list[Object]:
    """The mounts of the volumes that pods.py renders."""
    mounts: list[Object] = [{"name": names.HOME_VOLUME, "mountPath": names.HOME}]
    if not writes_anywhere(plan):
        mounts.append({"name": names.TEMPORARY_VOLUME, "mountPath": "/tmp"})
    mounts.append({"name": names.LINK_VOLUME, "mountPath": names.LINK_FOLDER, "readOnly": True})
    if shared_memory_size(plan, "default"):
        mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})
    mounts += [{"name": claim, "mountPath": path} for claim, path in claim_mounts(plan).items()]
    return mounts


def shared_memory_size(plan: ServicePlan, default: str) -> str:
    """The size limit of /dev/shm; empty: the container runtime's default, 64 MiB."""
    given = plan.spec.shared_memory
    if given is not None and given.disabled:
        return ""
    if given is not None and given.size is not None:
        return str(given.size)
    return default if plan.needs_gpu_stack else ""


def claim_mounts(plan: ServicePlan) -> dict[str, str]:
    """The mount path of each PersistentVolumeClaim, by its name."""
    mounts = {claim.name: claim.mount_point for claim in plan.spec.pvcs if claim.mount_point}
    if plan.spec.pvc is not None and plan.spec.pvc.mount_point:
        mounts[plan.spec.pvc.name] = plan.spec.pvc.mount_point
    for mount in plan.spec.volume_mounts:
        path = mount.mount_point or (_COMPILATION_CACHE if mount.use_as_compilation_cache else "")
        if path:
            mounts[mount.name] = path
    return mounts


def _compilation_cache(plan: ServicePlan) -> str:
    caches = [mount for mount in plan.spec.volume_mounts if mount.use_as_compilation_cache]
    return (caches[0].mount_point or _COMPILATION_CACHE) if caches and plan.needs_gpu_stack else ""
