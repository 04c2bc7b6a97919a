"""The operator's loop: caches of the cluster's objects, a queue of graphs, and tasks that reconcile the
queued graphs.

A change of a graph, or of an object that belongs to it, only puts the graph's key into the queue. Only the
operator that holds the lease has caches and reconciles.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import msgspec

from penstock.clock import Clock
from penstock.kubernetes.api import Api, ApiError, Kind, Object, labels_of, name_of, namespace_of, uid_of
from penstock.kubernetes.kinds import (
    ADAPTERS,
    DEPLOYMENTS,
    DISRUPTION_BUDGETS,
    DISRUPTION_BUDGETS_BETA,
    GRAPHS,
    PODS,
    ROLE_BINDINGS,
    ROLES,
    SECRETS,
    SERVICE_ACCOUNTS,
    SERVICES,
    VOLUME_CLAIMS,
)
from penstock.kubernetes.reflector import Key, Reflector
from penstock.operator import names
from penstock.operator.event_recorder import EventRecorder
from penstock.operator.metrics import OperatorMetrics
from penstock.operator.owned import NotLeading, OwnedObjects, owner_uid
from penstock.operator.reconciler import Caches, Reconciler, graph_of_pod, keep_status_writers
from penstock.operator.settings import OPTIONAL_KINDS, RenderSettings
from penstock.operator.work_queue import WorkQueue

log = logging.getLogger(__name__)

ALWAYS_SERVED = (
    SERVICES,
    SECRETS,
    SERVICE_ACCOUNTS,
    VOLUME_CLAIMS,
    DEPLOYMENTS,
    ROLES,
    ROLE_BINDINGS,
    ADAPTERS,
)

_OWN_LABEL = f"app.kubernetes.io/managed-by={names.MANAGER}"
LOOK_FOR_APIS_S = 60.0
"""Interval between checks whether optional kinds have been installed."""

_SETTLE_S = 0.1
"""Delay before a changed graph is reconciled. Changes come in bursts: a roll changes a Deployment, its pods
and their status. One reconciliation handles them all."""


class ControllerSettings(msgspec.Struct, frozen=True):
    """The settings of a controller.

    namespace: the namespace whose graphs are managed; empty: all.
    workers: the number of graphs that are reconciled at the same time.
    """

    namespace: str = ""
    workers: int = 4


class Controller:
    """Reconciles graphs while `leads` returns True."""

    def __init__(
        self,
        api: Api,
        settings: ControllerSettings,
        render: RenderSettings,
        metrics: OperatorMetrics,
        clock: Clock,
        host: str,
        leads: Callable[[], bool] = lambda: True,
        utc: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._api = api
        self._settings = settings
        self._render = render
        self._metrics = metrics
        self._clock = clock
        self._leads = leads
        self._utc = utc
        self._queue: WorkQueue[Key] = WorkQueue(clock)
        self._recorder = EventRecorder(api, host, utc)
        self._synced = asyncio.Event()
        self._reflectors: list[Reflector] = []
        self._owned: OwnedObjects | None = None
        self._reconciler: Reconciler | None = None
        metrics.queue_from(lambda: len(self._queue))

    def trouble(self) -> str:
        """Why a cache may be out of date; empty when all are up to date."""
        return next((f"{cache.kind}: {cache.trouble}" for cache in self._reflectors if cache.trouble), "")

    async def run(self) -> None:
        """Work until cancelled, or until the cluster serves further optional kinds; then the caller starts
        a new controller. Raises ApiError if the API server does not say which kinds it serves."""
        served = await self._optional_kinds()
        graphs = self._reflector(GRAPHS, "", self._graph_changed, trim=keep_status_writers)
        pods = self._reflector(
            PODS, names.DISCOVERED_BY, self._part_changed, trim=_essence_of_pod, index=graph_of_pod
        )
        owned = {
            kind: self._reflector(kind, _OWN_LABEL, self._part_changed, index=owner_uid)
            for kind in (*ALWAYS_SERVED, *served)
        }
        self._owned = OwnedObjects(self._api, owned, self._leads)
        self._reconciler = Reconciler(
            self._api,
            Caches(graphs, owned[ADAPTERS], pods),
            self._owned,
            self._recorder,
            self._render,
            frozenset(served),
            self._utc,
        )
        self._metrics.graphs_from(lambda: [_state(graph) for graph in graphs])
        missing = [str(kind) for kind in OPTIONAL_KINDS if kind not in served]
        log.info(
            "managing graphs of %s: not served by this cluster: %s",
            f"namespace {self._settings.namespace}" if self._settings.namespace else "all namespaces",
            ", ".join(missing) or "nothing",
        )
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(reflector.run(), name=f"reflector {reflector.kind}")
                for reflector in self._reflectors
            ]
            looking = tasks.create_task(self._until_more_is_served(served))
            await self._synced.wait()
            running += [
                tasks.create_task(self._work(self._reconciler), name=f"reconciler {number}")
                for number in range(self._settings.workers)
            ]
            await looking
            for task in running:
                task.cancel()

    async def _optional_kinds(self) -> list[Kind]:
        """The optional kinds that the cluster serves; of two versions of a kind only the newer."""
        served = [kind for kind in OPTIONAL_KINDS if await self._api.serves(kind)]
        if DISRUPTION_BUDGETS in served and DISRUPTION_BUDGETS_BETA in served:
            served.remove(DISRUPTION_BUDGETS_BETA)
        return served

    async def _until_more_is_served(self, before: Sequence[Kind]) -> None:
        """Wait until a further optional kind is served. A kind that is missing now is not taken for
        removed: a starting API server begins to serve kinds one after the other."""
        while True:
            await self._clock.sleep(LOOK_FOR_APIS_S)
            try:
                served = await self._optional_kinds()
            except ApiError:
                continue  # the caches log an outage
            if more := [str(kind) for kind in served if kind not in before]:
                log.info("the cluster now serves %s: listing all objects again", ", ".join(more))
                return

    def _reflector(
        self,
        kind: Kind,
        labels: str,
        on_change: Callable[[Object | None, Object | None], None],
        *,
        trim: Callable[[Object], Object] | None = None,
        index: Callable[[Object], str] = lambda item: "",
    ) -> Reflector:
        made = Reflector(
            self._api,
            kind,
            self._settings.namespace,
            labels,
            on_change=on_change,
            on_synced=self._check_synced,
            trim=trim,
            index=index,
            clock=self._clock,
        )
        self._reflectors.append(made)
        return made

    def _check_synced(self) -> None:
        if all(reflector.synced for reflector in self._reflectors):
            self._synced.set()

    def _graph_changed(self, before: Object | None, after: Object | None) -> None:
        item = after or before
        assert item is not None
        self._queue.add((namespace_of(item), name_of(item)), _SETTLE_S)
        if after is None and self._reconciler is not None:
            self._reconciler.forget(uid_of(item))

    def _part_changed(self, before: Object | None, after: Object | None) -> None:
        item = after or before
        assert item is not None
        graph = labels_of(item).get(names.GRAPH_NAME)
        if graph is not None:
            self._queue.add((namespace_of(item), graph), _SETTLE_S)
        if after is None and self._owned is not None:
            self._owned.forget(uid_of(item))

    async def _work(self, reconciler: Reconciler) -> None:
        while True:
            key = await self._queue.take()
            began = time.monotonic()
            outcome = "done"
            try:
                due_s = await reconciler.reconcile(key)
            except NotLeading:  # the lease is lost; this controller is cancelled in a moment
                outcome = "failed"
                self._queue.failed(key)
            except ApiError as error:
                outcome = "failed"
                pause_s = self._queue.failed(key)
                # A conflict means that a cache is a moment behind. The caches log an outage.
                level = logging.DEBUG if error.is_conflict or error.status == 0 else logging.WARNING
                log.log(level, "%s/%s: failed, next try in %.1f s: %s", *key, pause_s, error)
            except Exception:  # a bug met with one graph must not stop the work on others
                outcome = "defect"
                pause_s = self._queue.failed(key)
                log.exception("%s/%s: an error in the operator, next try in %.1f s", *key, pause_s)
            else:
                self._queue.done(key)
                if due_s is not None:
                    self._queue.add(key, max(1.0, due_s))
            self._metrics.reconciled(outcome, time.monotonic() - began)


def _essence_of_pod(pod: Object) -> Object:
    """The parts of a pod that the status needs. The spec, which is most of a pod, is left out."""
    metadata = pod["metadata"]
    kept = ("name", "namespace", "uid", "labels", "annotations", "resourceVersion", "deletionTimestamp")
    return {
        "metadata": {field: metadata[field] for field in kept if field in metadata},
        "status": pod.get("status") or {},
    }


def _state(graph: Object) -> str:
    return str((graph.get("status") or {}).get("state") or "pending")
