"""Brings one graph's objects in line with its manifest: renders them, applies them, and writes the status.

It is level-based: all decisions follow from the cluster's present state, and none from events. So it may
run any number of times, may be interrupted anywhere, and may miss events.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from penstock.errors import ConfigError
from penstock.kubernetes.api import (
    Api,
    ApiError,
    Kind,
    Object,
    annotations_of,
    is_being_deleted,
    labels_of,
    name_of,
    namespace_of,
    uid_of,
)
from penstock.kubernetes.kinds import ADAPTERS, DEPLOYMENTS, GRAPHS, LEADER_WORKER_SETS, SECRETS
from penstock.kubernetes.reflector import Key, Reflector
from penstock.operator import names
from penstock.operator.event_recorder import EventRecorder
from penstock.operator.idle import mark_busy_pods, shrinks
from penstock.operator.links import link_secrets, next_due_at, secret_names
from penstock.operator.owned import MENDS_S, Action, NotGone, NotOurs, ObjectRefused, OwnedObjects
from penstock.operator.rendering.desired import desired
from penstock.operator.rendering.refusals import in_words
from penstock.operator.settings import ClusterFacts, Desired, RenderedService, RenderSettings
from penstock.operator.status import Observed, status_of

TAKE_OVER = "penstock.dev/take-over"
"""Annotation by which a user states that the other operator was removed."""

_RETRY_REFUSED_S = 60.0
"""Pause before an object that the API server refused is sent again: a quota or a webhook may have
changed."""


class Caches(msgspec.Struct, frozen=True):
    """The caches of objects that no graph owns."""

    graphs: Reflector
    adapters: Reflector
    pods: Reflector


class Reconciler:
    """Reconciles graphs.

    Args:
        served: the optional kinds of objects that the cluster serves.
    """

    def __init__(
        self,
        api: Api,
        caches: Caches,
        owned: OwnedObjects,
        recorder: EventRecorder,
        settings: RenderSettings,
        served: frozenset[Kind],
        utc: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._api = api
        self._caches = caches
        self._owned = owned
        self._recorder = recorder
        self._settings = settings
        self._served = served
        self._utc = utc
        self._rendered: dict[
            str, Desired
        ] = {}  # by the graph's uid: what its last valid manifest renders to

    async def reconcile(self, key: Key) -> float | None:
        """Reconcile one graph. Returns the seconds after which it is due again although nothing has
        changed; None if it is not.

        Raises ApiError when the call should be repeated, NotLeading when another operator may act.
        """
        graph = self._caches.graphs.items.get(key)
        if graph is None or is_being_deleted(graph):
            return None  # the cluster's garbage collector deletes the objects that it owns
        self._owned.check_leads()
        if reason := other_operator(graph):
            await self._recorder.record(graph, "NotOurs", reason, "Warning")
            return None
        try:
            wanted = desired(graph, self._settings, self._facts(graph))
        except ConfigError as error:
            await self._recorder.record(graph, "ManifestInvalid", str(error), "Warning")
            await self._tell(graph, self._observed(graph, invalid="; ".join(str(error).splitlines())))
            return await self._renew_links(graph)
        self._rendered[uid_of(graph)] = wanted
        for note in wanted.notes:
            text = f"{note.service}: {note.message}" if note.service else note.message
            await self._recorder.record(graph, note.reason, text)
        links = self._links(graph)
        refused, awaited, awaited_s = "", "", math.inf
        try:
            await self._adapters(graph, wanted)
            await self._mark_busy_pods(graph, wanted)
            actions = await self._owned.converge(graph, [*links, *wanted.objects], wanted.adapters)
            if await self._report(graph, actions):
                awaited_s = MENDS_S
        except NotOurs as error:
            refused = str(error)
        except ObjectRefused as error:
            refused = self._in_words(error, graph, wanted)
        except NotGone as error:
            awaited = str(error)
        except ApiError as error:
            if error.is_of_ending_namespace:
                return None  # the graph will be deleted with its namespace
            if not (error.is_refused or error.is_forbidden):
                raise
            refused = str(error)
        if refused:
            await self._recorder.record(graph, "NotApplied", refused, "Warning")
        await self._tell(graph, self._observed(graph, refused=refused, awaited=awaited))
        due_s = (next_due_at(links) - self._utc()).total_seconds()
        return min(due_s, _RETRY_REFUSED_S if refused or awaited else awaited_s)

    async def _renew_links(self, graph: Object) -> float | None:
        """Renew the certificates of a graph with an invalid manifest, for the pods that it already has."""
        if self._owned.find(SECRETS, namespace_of(graph), names.link_secret(name_of(graph), "ca")) is None:
            return None
        links = self._links(graph)
        try:
            await self._owned.apply(graph, links)
        except (NotOurs, NotGone, ObjectRefused):
            return _RETRY_REFUSED_S
        return (next_due_at(links) - self._utc()).total_seconds()

    def forget(self, uid: str) -> None:
        """Forget a graph that was deleted."""
        self._rendered.pop(uid, None)

    # --- what the cluster has ----------------------------------------------------------------------------

    def _facts(self, graph: Object) -> ClusterFacts:
        replicas = {
            str(adapter["spec"]["dgdRef"]["serviceName"]): int(adapter["spec"].get("replicas") or 0)
            for adapter in self._caches.adapters
            if namespace_of(adapter) == namespace_of(graph)
            and adapter["spec"]["dgdRef"]["name"] == name_of(graph)
            and not is_being_deleted(adapter)
        }
        return ClusterFacts(served=self._served, adapter_replicas=replicas)

    def _links(self, graph: Object) -> list[Object]:
        name, namespace = name_of(graph), namespace_of(graph)
        current = {}
        for secret_name in secret_names(name):
            found = self._owned.find(SECRETS, namespace, secret_name)
            if found is not None:
                current[secret_name] = found
        made = link_secrets(name, current, self._utc())
        for secret in made:
            secret["metadata"]["labels"] = names.common_labels(name, "link")
        return made

    def _observed(
        self, graph: Object, *, invalid: str = "", refused: str = "", awaited: str = ""
    ) -> Observed:
        wanted = self._rendered.get(uid_of(graph))
        services = wanted.services if wanted is not None else ()
        workloads = {
            name_of(item): self._owned.as_applied(item)
            for kind, item in self._owned.of(graph)
            if kind in (DEPLOYMENTS, LEADER_WORKER_SETS)
        }
        return Observed(services, workloads, self._pods(graph), invalid, refused, awaited)

    def _pods(self, graph: Object) -> dict[str, list[Object]]:
        """The graph's pods, by the value of their selector label."""
        found: dict[str, list[Object]] = {}
        for pod in self._caches.pods.found(f"{namespace_of(graph)}/{name_of(graph)}"):
            if selector := labels_of(pod).get(names.SELECTOR):
                found.setdefault(selector, []).append(pod)
        return found

    def _in_words(self, refused: ObjectRefused, graph: Object, wanted: Desired) -> str:
        named = {service.object_name: service.name for service in wanted.services}
        service = named.get(name_of(refused.item), "")
        given = (graph["spec"].get("services") or {}).get(service) or {}
        return in_words(refused.error, refused.item, service, given)

    # --- status, events, marks
    # -----------------------------------------------------------------------------

    async def _adapters(self, graph: Object, wanted: Desired) -> None:
        """Create missing scaling adapters, and update the status of all."""
        services = {service.object_name: service for service in wanted.services}
        for adapter in wanted.adapters:
            if await self._owned.create_missing(graph, adapter):
                await self._recorder.record(graph, "Created", f"{adapter['kind']} {name_of(adapter)}")
            live = self._caches.adapters.get(namespace_of(graph), name_of(adapter))
            if live is not None:
                await self._tell_adapter(live, services[name_of(adapter)])

    async def _tell_adapter(self, adapter: Object, service: RenderedService) -> None:
        workload = self._owned.find(DEPLOYMENTS, namespace_of(adapter), service.object_name)
        status = {
            "replicas": ((workload or {}).get("status") or {}).get("replicas", 0),
            "selector": f"{names.SELECTOR}={service.object_name}",
        }
        if (adapter.get("status") or {}) != status:
            await self._write_status(adapter, status)

    async def _mark_busy_pods(self, graph: Object, wanted: Desired) -> None:
        pods: dict[str, list[Object]] | None = None
        for item in wanted.objects:
            if item["kind"] != DEPLOYMENTS.name:
                continue
            live = self._owned.find(DEPLOYMENTS, namespace_of(graph), name_of(item))
            if live is not None and shrinks(live, item):
                pods = pods if pods is not None else self._pods(graph)
                self._owned.check_leads()
                await mark_busy_pods(self._api, live, pods.get(name_of(item), ()))

    async def _report(self, graph: Object, actions: Iterable[Action]) -> bool:
        """Record one event for all created objects, one for all updated objects, and so on. Returns whether
        a contested object was left as it is."""
        by_verb: dict[str, list[str]] = {}
        for action in actions:
            by_verb.setdefault(action.verb, []).append(f"{action.kind} {action.name}")
        contested = ", ".join(by_verb.pop("Contested", ()))
        for verb, objects in by_verb.items():
            await self._recorder.record(graph, verb, ", ".join(objects))
        if contested:
            message = (
                f"{contested}: something else keeps changing it. It is corrected every {MENDS_S:.0f} s"
            )
            await self._recorder.record(graph, "Contested", message, "Warning")
        return bool(contested)

    async def _tell(self, graph: Object, observed: Observed) -> None:
        before = graph.get("status") or {}
        status = status_of(graph, observed, self._utc())
        if status == before:
            return
        await self._write_status(graph, status)
        if status["state"] != before.get("state") and not observed.invalid:
            ready, progressing = status["conditions"]
            if status["state"] == "successful":
                await self._recorder.record(graph, "Ready", "all services are ready")
            elif progressing["status"] == "False":
                await self._recorder.record(graph, "RollStuck", progressing["message"], "Warning")
            elif before.get("state") == "successful":
                await self._recorder.record(graph, "NotReady", ready["message"])

    async def _write_status(self, item: Object, status: Mapping[str, Any]) -> None:
        kind = GRAPHS if item["kind"] == GRAPHS.name else ADAPTERS
        metadata = {"name": name_of(item), "namespace": namespace_of(item)}
        whole = {
            "apiVersion": kind.api_version,
            "kind": kind.name,
            "metadata": metadata,
            "status": dict(status),
        }
        self._owned.check_leads()
        try:
            await self._api.apply(kind, whole, names.MANAGER, subresource="status")
        except ApiError as error:
            if not error.is_not_found:  # deleted meanwhile
                raise


def graph_of_pod(pod: Object) -> str:
    """Namespace and name of the graph that a pod serves: the key of the index of pods."""
    return f"{namespace_of(pod)}/{labels_of(pod).get(names.DISCOVERED_BY, '')}"


def keep_status_writers(graph: Object) -> Object:
    """A graph as it is cached. Of its long `managedFields`, only the entries of the status are kept."""
    metadata = graph["metadata"]
    metadata["managedFields"] = [
        {"manager": entry.get("manager", ""), "time": entry.get("time", "")}
        for entry in metadata.get("managedFields") or ()
        if "f:status" in (entry.get("fieldsV1") or {})
    ]
    return graph


def other_operator(graph: Object) -> str:
    """Names the other operator that manages this graph, and what to do; empty if there is none."""
    if annotations_of(graph).get(TAKE_OVER) == "true":
        return ""
    writers = [(entry["manager"], entry["time"]) for entry in graph["metadata"]["managedFields"]]
    own = max((at for writer, at in writers if writer == names.MANAGER), default="")
    for writer, at in writers:
        if writer != names.MANAGER and not writer.startswith("kubectl") and at > own:
            return (
                f"another operator manages this graph: {writer!r} wrote its status at {at}. Penstock leaves"
                " the graph alone. Remove that operator, then: kubectl annotate"
                f" dynamographdeployment {name_of(graph)} {TAKE_OVER}=true"
            )
    return ""
