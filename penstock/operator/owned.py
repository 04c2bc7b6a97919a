"""Applies the objects that a graph should have, and deletes those that it should no longer have.

An object is applied when its wanted state has changed, or when another program has changed its spec since
the operator applied it. The operator remembers what it applied, with the object's generation (its
resourceVersion if it has none). So an operator with nothing to do writes nothing. After its start it
remembers nothing, and applies each object once; that changes only objects that differ.

An object of the same name that belongs to something else is left alone, and is an error. If another program
keeps changing an object back, the operator corrects it MENDS_MAX times, and then once in MENDS_S. Otherwise
the two would fill the API server's history.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
import xxhash

from penstock.errors import PenstockError
from penstock.kubernetes.api import Api, ApiError, Kind, Object, is_being_deleted, name_of, uid_of
from penstock.kubernetes.kinds import VOLUME_CLAIMS
from penstock.kubernetes.reflector import Reflector
from penstock.operator.names import MANAGER

MENDS_MAX = 5
MENDS_S = 60.0


class ObjectRefused(PenstockError):
    """The API server refuses an object, and would refuse it again."""

    def __init__(self, item: Object, error: ApiError) -> None:
        super().__init__(str(error))
        self.item = item
        self.error = error


class NotOurs(PenstockError):
    """An object with the name that a graph needs belongs to something else."""


class NotGone(PenstockError):
    """An object of a deleted graph has the name that a new graph needs. It will be deleted soon."""


class NotLeading(PenstockError):
    """This operator may not write: another one may act already."""


class Action(msgspec.Struct, frozen=True):
    """What the operator did to an object: Created, Updated, Deleted; or Contested, if it left another
    program's change for now."""

    verb: str
    kind: str
    name: str


_Applied = tuple[int, int]  # hash of the wanted object, and the state of the object after applying it


class OwnedObjects:
    """The objects of all graphs.

    Args:
        caches: the cluster's objects, by kind. The cluster does not serve kinds without a cache.
        leads: whether this operator may write now.
        now: seconds since an arbitrary start.
    """

    def __init__(
        self,
        api: Api,
        caches: Mapping[Kind, Reflector],
        leads: Callable[[], bool],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api = api
        self._caches = caches
        self._leads = leads
        self._now = now
        self._applied: dict[str, _Applied] = {}  # by the object's uid
        self._mended: dict[
            str, deque[float]
        ] = {}  # when changes of other programs were undone, by the object's uid
        self._kinds = {(kind.api_version, kind.name): kind for kind in caches}

    def forget(self, uid: str) -> None:
        """Forget an object that was deleted."""
        self._applied.pop(uid, None)
        self._mended.pop(uid, None)

    def of(self, graph: Object) -> Iterable[tuple[Kind, Object]]:
        """The objects that this graph controls."""
        for kind, cache in self._caches.items():
            for item in cache.found(uid_of(graph)):
                yield kind, item

    def as_applied(self, live: Object) -> Object:
        """The cached object. Where the cache is older than what was applied, with the applied one's
        generation, so that its status, which names an older one, does not count for it."""
        _, state = self._applied.get(uid_of(live), (0, 0))
        if "generation" not in live["metadata"] or _state(live) >= state:
            return live
        return {**live, "metadata": {**live["metadata"], "generation": state}}

    def find(self, kind: Kind, namespace: str, name: str) -> Object | None:
        cache = self._caches.get(kind)
        return cache.get(namespace, name) if cache is not None else None

    async def converge(
        self, graph: Object, wanted: Iterable[Object], kept: Iterable[Object] = ()
    ) -> list[Action]:
        """Apply `wanted`, then delete the graph's other objects, except those in `kept`.

        Raises ObjectRefused for the first object that the server does not take, NotOurs, NotGone,
        NotLeading, and ApiError when the call should be repeated.
        """
        wanted = list(wanted)
        actions = await self.apply(graph, wanted)
        names = {(self.kind_of(item), name_of(item)) for item in (*wanted, *kept)}
        for kind, item in list(self.of(graph)):
            # Volume claims hold users' data: they are deleted with their graph, and not because a line of
            # the manifest was changed.
            if (kind, name_of(item)) not in names and kind != VOLUME_CLAIMS and not is_being_deleted(item):
                self.check_leads()
                await self._api.delete(
                    kind, name_of(item), graph["metadata"]["namespace"], uid=uid_of(item)
                )
                actions.append(Action("Deleted", kind.name, name_of(item)))
        return actions

    async def apply(self, graph: Object, wanted: Iterable[Object]) -> list[Action]:
        """Apply `wanted`, and delete nothing. Raises the same errors as `converge`."""
        actions = [await self._apply(self.kind_of(item), graph, item) for item in wanted]
        return [action for action in actions if action is not None]

    async def create_missing(self, graph: Object, item: Object) -> bool:
        """Create an object that other programs change from then on. Returns whether it was missing. Raises
        the same errors as `converge`."""
        kind = self.kind_of(item)
        namespace = graph["metadata"]["namespace"]
        live = await self._live(kind, namespace, name_of(item))
        if live is not None:
            _check_ours(live, graph)
            return False
        self.check_leads()
        try:
            await self._api.create(kind, owned(item, graph))
        except ApiError as error:
            if not error.is_conflict:  # the cache is behind
                raise
            return False
        return True

    def kind_of(self, item: Object) -> Kind:
        return self._kinds[(item["apiVersion"], item["kind"])]

    async def _live(self, kind: Kind, namespace: str, name: str) -> Object | None:
        """The object that has this name now. The caches hold only objects with the operator's label. An
        object without it must be seen as well, before it would be overwritten."""
        found = self.find(kind, namespace, name)
        if found is not None:
            return found
        try:
            return await self._api.get(kind, name, namespace)
        except ApiError as error:
            if error.is_not_found:
                return None
            raise

    async def _apply(self, kind: Kind, graph: Object, item: Object) -> Action | None:
        whole = owned(item, graph)
        wish = xxhash.xxh3_64_intdigest(msgspec.json.encode(whole))
        live = await self._live(kind, graph["metadata"]["namespace"], name_of(item))
        if live is not None:
            _check_ours(live, graph)
            if is_being_deleted(live) or self._is_settled(live, wish):
                return None
            if self._is_contested(uid_of(live)):
                return Action("Contested", kind.name, name_of(item))
        self.check_leads()
        try:
            result = await self._api.apply(kind, whole, MANAGER)
        except ApiError as error:
            if (error.is_refused or error.is_forbidden) and not error.is_of_ending_namespace:
                raise ObjectRefused(item, error) from error
            raise
        before, _ = self._applied.get(uid_of(result), (0, 0))
        self._applied[uid_of(result)] = wish, _state(result)
        if live is None:
            return Action("Created", kind.name, name_of(item))
        if _state(result) == _state(live):
            return None
        if before == wish:
            self._mended.setdefault(uid_of(live), deque(maxlen=MENDS_MAX)).append(self._now())
        return Action("Updated", kind.name, name_of(item))

    def _is_settled(self, live: Object, wish: int) -> bool:
        """Whether exactly this was applied, and the object has not changed since. The cached object may be
        older than the applied one."""
        applied, state = self._applied.get(uid_of(live), (0, 0))
        return applied == wish and _state(live) <= state

    def _is_contested(self, uid: str) -> bool:
        """Whether the object was corrected so often lately that it is left alone for a while."""
        times = self._mended.get(uid, deque())
        return len(times) == MENDS_MAX and self._now() - times[-1] < MENDS_S

    def check_leads(self) -> None:
        """Raises NotLeading."""
        if not self._leads():
            raise NotLeading("another operator may have taken over")


def owned(item: Object, graph: Object) -> Object:
    """The object with the graph's namespace, and with the graph as its owner."""
    owner = {
        "apiVersion": graph["apiVersion"],
        "kind": graph["kind"],
        "name": name_of(graph),
        "uid": uid_of(graph),
        "controller": True,
        "blockOwnerDeletion": True,
    }
    metadata = {**item["metadata"], "namespace": graph["metadata"]["namespace"], "ownerReferences": [owner]}
    return {**item, "metadata": metadata}


def owner_uid(item: Object) -> str:
    """The uid of the graph that controls this object; empty if none does."""
    return str(_controller(item).get("uid", ""))


def _controller(item: Object) -> Mapping[str, Any]:
    return next(
        (owner for owner in item["metadata"].get("ownerReferences") or () if owner.get("controller")), {}
    )


def _check_ours(live: Object, graph: Object) -> None:
    """Raises NotOurs, NotGone."""
    owner = _controller(live)
    if owner.get("uid") == uid_of(graph):
        return
    what = f"{live['kind']} {name_of(live)}"
    if not owner:
        raise NotOurs(f"{what} exists already and belongs to no graph: rename or delete it")
    if owner.get("kind") == graph["kind"] and owner.get("name") == name_of(graph):
        raise NotGone(f"{what} belongs to a deleted graph of this name, and still exists")
    raise NotOurs(f"{what} belongs to {owner.get('kind')} {owner.get('name')}: rename this graph")


def _state(item: Object) -> int:
    """A number that grows with each change of the spec, but not of the status if the object has a
    generation."""
    metadata = item["metadata"]
    return int(metadata.get("generation") or metadata["resourceVersion"])
