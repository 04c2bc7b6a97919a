"""Discovery on Kubernetes: every running worker pod of a graph is an instance.

A worker need not register, and needs no access to the API server. Frontends watch the pods with their
graph's label, and connect to each at its pod's address. Over the link they learn what the pod object does
not contain: the model that the worker serves, and its incarnation.

A pod that is being deleted is no longer listed. While its link is up, the worker finishes its requests.
While the API server does not answer, the last known pods stay.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from datetime import datetime

from penstock.clock import Clock
from penstock.kubernetes.api import Api, Object, is_being_deleted, labels_of, name_of, uid_of
from penstock.kubernetes.kinds import PODS
from penstock.kubernetes.reflector import Reflector, ReflectorSettings
from penstock.net.address import join_address
from penstock.shapes import Registration, Role

GRAPH_LABEL = "penstock.dev/graph"
"""The label of all serving pods of a graph. Its value is the graph's name, which is the `--namespace` of
the frontends and workers."""

ROLE_LABEL = "role"
CONTAINER = "main"
LINK_PORT = "link"
"""The name of the container port of the worker's link."""


class KubernetesDiscovery:
    """The `Discovery` port over the pods of one namespace.

    Args:
        api: None for a worker, which does not watch.
        namespace: the Kubernetes namespace.
        graph: the name of the graph.
    """

    def __init__(
        self,
        api: Api | None,
        namespace: str,
        graph: str,
        settings: ReflectorSettings = ReflectorSettings(),  # noqa: B008 - frozen
        clock: Clock | None = None,
    ) -> None:
        self._api = api
        self._namespace = namespace
        self._labels = f"{GRAPH_LABEL}={graph},{ROLE_LABEL} in ({','.join(Role)})"
        self._settings = settings
        self._clock = clock
        self._pods: Reflector | None = None
        self._followers: set[asyncio.Task[None]] = set()

    @property
    def trouble(self) -> str:
        return self._pods.trouble if self._pods is not None else "not asked yet"

    async def register(self, registration: Registration) -> PodLease:
        """Does nothing: frontends find the pod of this process."""
        return PodLease()

    async def watch(self) -> AsyncIterator[Mapping[str, Registration]]:
        assert self._api is not None, "workers do not watch"
        changed = asyncio.Event()
        pods = Reflector(
            self._api,
            PODS,
            self._namespace,
            self._labels,
            on_change=lambda before, after: changed.set(),
            on_synced=changed.set,
            trim=_what_matters,
            settings=self._settings,
            clock=self._clock,
        )
        self._pods = pods
        follower = asyncio.create_task(pods.run(), name="pods")
        follower.add_done_callback(lambda _: changed.set())
        self._followers.add(follower)
        previous: Mapping[str, Registration] | None = None
        try:
            while True:
                await changed.wait()
                changed.clear()
                if follower.done():
                    if not follower.cancelled():
                        follower.result()
                    return
                current = {name_of(pod): found for pod in pods if (found := registration_of(pod))}
                if pods.synced and current != previous:
                    previous = current
                    yield current
        finally:
            self._followers.discard(follower)
            follower.cancel()
            await asyncio.gather(follower, return_exceptions=True)

    async def close(self) -> None:
        """End all watches and close all connections."""
        for follower in self._followers:
            follower.cancel()
        await asyncio.gather(*self._followers, return_exceptions=True)
        if self._api is not None:
            await self._api.close()


class PodLease:
    """The registration of a worker on Kubernetes. It lasts as long as the pod."""

    registered = True
    trouble = ""

    async def close(self) -> None:
        """Does nothing: a worker that leaves reports this over its links."""


def registration_of(pod: Object) -> Registration | None:
    """The registration for a pod; None while frontends should not connect to it."""
    status = pod.get("status", {})
    containers = status.get("containerStatuses") or ()
    main: Object = next((found for found in containers if found["name"] == CONTAINER), {})
    running = main.get("state", {}).get("running")
    role = labels_of(pod).get(ROLE_LABEL)
    port = _link_port(pod)
    ip = status.get("podIP")
    if status.get("phase") != "Running" or running is None or is_being_deleted(pod):
        return None
    if role not in list(Role) or not port or not ip:
        return None
    return Registration(
        instance_id=name_of(pod),
        epoch=0,
        role=Role(role),
        model="",
        address=join_address(ip, port),
        host=pod["spec"].get("nodeName", ""),
        process=f"{uid_of(pod)}/{main.get('restartCount', 0)}",
        started_ms=_milliseconds(running.get("startedAt")),
    )


def _link_port(pod: Object) -> int:
    """The container port of the link; 0 if there is none."""
    for container in pod["spec"]["containers"]:
        if container["name"] == CONTAINER:
            for port in container.get("ports") or ():
                if port.get("name") == LINK_PORT:
                    return int(port["containerPort"])
    return 0


def _milliseconds(time: str | None) -> int:
    """The milliseconds since 1970 of a time; 0 if it is invalid."""
    try:
        return int(datetime.fromisoformat(time or "").timestamp() * 1000)
    except ValueError:
        return 0


def _what_matters(pod: Object) -> Object:
    """The parts of a pod that registrations need. A frontend may keep hundreds of pods."""
    metadata = pod["metadata"]
    names = "name", "namespace", "uid", "resourceVersion", "labels", "deletionTimestamp"
    containers = [
        {"name": container["name"], "ports": container.get("ports")}
        for container in pod["spec"]["containers"]
        if container["name"] == CONTAINER
    ]
    status = pod.get("status", {})
    return {
        "metadata": {name: metadata[name] for name in names if name in metadata},
        "spec": {"nodeName": pod["spec"].get("nodeName", ""), "containers": containers},
        "status": {
            "phase": status.get("phase"),
            "podIP": status.get("podIP"),
            "containerStatuses": [
                {name: found.get(name) for name in ("name", "state", "restartCount")}
                for found in status.get("containerStatuses") or ()
                if found["name"] == CONTAINER
            ],
        },
    }
