"""Instances as pods of an API server, written as the operator and the kubelets write them."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from penstock.discovery.kubernetes import KubernetesDiscovery, PodLease
from penstock.kubernetes.api import Api, Object, uid_of
from penstock.kubernetes.kinds import PODS
from penstock.kubernetes.reflector import ReflectorSettings
from penstock.net.address import split_address
from penstock.shapes import Registration

QUICK = ReflectorSettings(watch_s=2, retry_min_s=0.05, retry_max_s=0.5)
GRAPH = "g"


def pod(namespace: str, name: str, role: str, port: int, graph: str = GRAPH) -> Object:
    main = {"name": "main", "image": "penstock:dev", "ports": [{"name": "link", "containerPort": port}]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {"penstock.dev/graph": graph, "role": role, "app": graph},
        },
        "spec": {
            "schedulerName": "none",  # on a real server nobody else writes its status then
            "automountServiceAccountToken": False,
            "containers": [{"name": "sidecar", "image": "other:1"}, main],
        },
    }


def running(ip: str, *, restarts: int = 0, started: float | None = None) -> Object:
    """The status of a pod whose containers run."""
    at = datetime.fromtimestamp(started or time.time(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    containers = [
        {
            "name": name,
            "state": {"running": {"startedAt": at}},
            "restartCount": restarts if name == "main" else 7,
            "ready": True,
            "image": "penstock:dev",
            "imageID": "",
        }
        for name in ("main", "sidecar")
    ]
    return {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "containerStatuses": containers}


async def tell(api: Api, namespace: str, name: str, status: Object) -> None:
    await api.patch(PODS, name, {"status": status}, namespace, subresource="status")


class _Pod(PodLease):
    def __init__(self, api: Api, made: Object) -> None:
        self._api, self._made = api, made

    async def close(self) -> None:
        metadata = self._made["metadata"]
        found = await self._api.list(PODS, metadata["namespace"])
        if any(uid_of(other) == metadata["uid"] for other in found.items):
            await self._api.delete(PODS, metadata["name"], metadata["namespace"], uid=metadata["uid"])


class PodMakingDiscovery(KubernetesDiscovery):
    """Registers as Kubernetes does for a worker: by a pod. One of the same name is replaced."""

    def __init__(self, api: Api, namespace: str, **options: Any) -> None:
        super().__init__(api, namespace, GRAPH, QUICK, **options)
        self._namespace = namespace
        self.api = api

    async def register(self, registration: Registration) -> PodLease:
        host, port = split_address(registration.address)
        name = registration.instance_id
        await self.api.delete(PODS, name, self._namespace)
        made = await self.api.create(PODS, pod(self._namespace, name, registration.role, port))
        await tell(self.api, self._namespace, name, running(host))
        return _Pod(self.api, made)


def essence(found: Registration) -> object:
    """What a pod says of an instance."""
    return found.instance_id, found.role, found.address
