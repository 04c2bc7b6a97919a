"""Makes Kubernetes remove idle workers first when a service shrinks.

The Deployment controller chooses which pods to remove, and prefers those with the lowest
`pod-deletion-cost` (Kubernetes 1.22 and newer). So right before a Deployment shrinks, the operator fetches
the load of each of its pods, and sets that as the cost. A pod that does not answer gets the lowest cost.
"""

from __future__ import annotations

import asyncio
import http.client
import logging
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from penstock.kubernetes.api import (
    Api,
    ApiError,
    Object,
    annotations_of,
    is_being_deleted,
    name_of,
    namespace_of,
)
from penstock.kubernetes.kinds import PODS
from penstock.operator import names

log = logging.getLogger(__name__)

COST = "controller.kubernetes.io/pod-deletion-cost"
ANSWER_S = 2.0
_SILENT = -1
_ASKED_AT_ONCE = 32
_ANSWER_BYTES_MAX = 1024 * 1024


async def mark_busy_pods(api: Api, workload: Object, pods: Sequence[Object]) -> None:
    """Set the deletion cost of the pods of a Deployment that is about to shrink. A failure is logged and
    ignored: if a busy pod is removed, its requests are continued elsewhere."""
    port = _system_port(workload)
    if port is None:
        return
    places = asyncio.Semaphore(_ASKED_AT_ONCE)

    async def mark(pod: Object) -> None:
        async with places:
            cost = str(await asyncio.to_thread(_busyness, pod, port))
            if annotations_of(pod).get(COST) == cost:
                return
            try:
                changes = {"metadata": {"annotations": {COST: cost}}}
                await api.patch(PODS, name_of(pod), changes, namespace_of(pod))
            except ApiError as error:
                log.info("pod %s/%s is not marked: %s", namespace_of(pod), name_of(pod), error)

    await asyncio.gather(*(mark(pod) for pod in pods if not is_being_deleted(pod)))


def _busyness(pod: Object, port: int) -> int:
    """The worker's attempts and handoffs together; _SILENT if it does not answer."""
    host = (pod.get("status") or {}).get("podIP", "")
    return busyness_at(host, port) if host else _SILENT


def busyness_at(host: str, port: int) -> int:
    """The attempts and handoffs of the worker at this address; _SILENT if it does not answer."""
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/health"
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_S) as response:
            return busyness(response.read(_ANSWER_BYTES_MAX))
    except (
        urllib.error.HTTPError
    ) as error:  # a worker that is draining or starting answers with an error status
        with error:
            return busyness(error.read(_ANSWER_BYTES_MAX))
    except (OSError, http.client.HTTPException):
        return _SILENT


def busyness(health: bytes) -> int:
    """The attempts and handoffs in the body of a worker's /health; _SILENT if it is invalid."""
    try:
        counts = msgspec.json.decode(health, type=dict[str, Any])
        return sum(int(counts.get(name, 0)) for name in ("attempts", "held_handoffs"))
    except (msgspec.DecodeError, TypeError, ValueError):
        return _SILENT


def shrinks(before: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether `wanted` has fewer replicas than `before`."""
    return int(wanted["spec"].get("replicas", 1)) < int(before["spec"].get("replicas", 1))


def _system_port(workload: Object) -> int | None:
    for container in workload["spec"]["template"]["spec"].get("containers") or ():
        for port in container.get("ports") or ():
            if port.get("name") == names.SYSTEM_PORT_NAME:
                return int(port["containerPort"])
    return None
