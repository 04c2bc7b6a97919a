"""A graph's objects made to be as wanted: applied where they differ, deleted where they are no longer
wanted.

An object is applied when what is wanted has changed, or when somebody else changed its spec since it was
last applied here. What was applied is remembered by the object's generation (its resourceVersion where it
has none), so that an operator with nothing to do writes nothing. One that has just started remembers
nothing and applies all once, which changes nothing where nothing differs.

An object of the same name that belongs to somebody else is left alone, and is an error. One that somebody
changes back again and again is mended MENDS_MAX times, and then once in MENDS_S: two that fight would fill
the API server's history, and neither would win.
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
    """The API server does not take an object, however often it is sent."""

    def __init__(self, item: Object, error: ApiError) -> None:
        super().__init__(str(error))
        self.item = item
        self.error = error


class NotOurs(PenstockError):
    """An object that a graph needs belongs to somebody else."""


class NotGone(PenstockError):
    """An object of a deleted graph is in the place of one that its successor needs, and will go."""


class NotLeading(PenstockError):
    """This operator may not write any more: another one may act by now."""


class Action(msgspec.Struct, frozen=True):
    """What was done to one object: Created, Updated, Deleted, or Contested: left as somebody made it, for
    now."""

    verb: str
    kind: str
    name: str


_Applied = tuple[int, int]  # a hash of what was wanted, and which state of the object that led to


class OwnedObjects:
    """Objects of all graphs.

    Args:
        caches: what the cluster has, by kind; kinds without one are not served there.
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
        self._mended: dict[str, deque[float]] = {}  # when somebody's change was undone, by the object's uid
        self._kinds = {(kind.api_version, kind.name): kind for kind in caches}

    def forget(self, uid: str) -> None:
        """The object is gone."""
        self._applied.pop(uid, None)
        self._mended.pop(uid, None)

    def of(self, graph: Object) -> Iterable[tuple[Kind, Object]]:
        """The objects that this graph controls."""
        for kind, cache in self._caches.items():
            for item in cache.found(uid_of(graph)):
                yield kind, item

    def find(self, kind: Kind, namespace: str, name: str) -> Object | None:
        cache = self._caches.get(kind)
        return cache.get(namespace, name) if cache is not None else None

    async def converge(
        self, graph: Object, wanted: Iterable[Object], kept: Iterable[Object] = ()
    ) -> list[Action]:
        """Apply `wanted`, then delete what the graph has besides them and `kept`.

        Raises ObjectRefused for the first object that the server does not take, NotOurs, NotGone,
        NotLeading, and ApiError when the call should be repeated.
        """
        wanted = list(wanted)
        actions = await self.apply(graph, wanted)
        names = {(self.kind_of(item), name_of(item)) for item in (*wanted, *kept)}
        for kind, item in list(self.of(graph)):
            # Volume claims hold people's data: they end with their graph, and not because a line was
            # changed.
            if (kind, name_of(item)) not in names and kind != VOLUME_CLAIMS and not is_being_deleted(item):
                self.check_leads()
                await self._api.delete(
                    kind, name_of(item), graph["metadata"]["namespace"], uid=uid_of(item)
                )
                actions.append(Action("Deleted", kind.name, name_of(item)))
        return actions

    async def apply(self, graph: Object, wanted: Iterable[Object]) -> list[Action]:
        """Apply `wanted`, and delete nothing. Raises as `converge`."""
        actions = [await self._apply(self.kind_of(item), graph, item) for item in wanted]
        return [action for action in actions if action is not None]

    async def create_missing(self, graph: Object, item: Object) -> bool:
        """Create an object that others change from then on. Whether it was missing. Raises as
        `converge`."""
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
        """What has this name now. Caches hold what has the operator's label; somebody else's object has
        not, and must be seen before it is written over."""
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
        """Whether just this was applied, and nobody has changed the object since. What a cache shows may be
        older than what was applied."""
        applied, state = self._applied.get(uid_of(live), (0, 0))
        return applied == wish and _state(live) <= state

    def _is_contested(self, uid: str) -> bool:
        """Whether it was mended so often of late that it is left alone for a while."""
        times = self._mended.get(uid, deque())
        return len(times) == MENDS_MAX and self._now() - times[-1] < MENDS_S

    def check_leads(self) -> None:
        """Raises NotLeading."""
        if not self._leads():
            raise NotLeading("another operator may have taken over")


def owned(item: Object, graph: Object) -> Object:
    """The object in the graph's namespace, and to be deleted with the graph."""
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
    """Of the graph that controls this object; empty when none does."""
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
        raise NotOurs(f"{what} is there already and belongs to no graph: rename or delete it")
    if owner.get("kind") == graph["kind"] and owner.get("name") == name_of(graph):
        raise NotGone(f"{what} is of a deleted graph of this name, and not gone yet")
    raise NotOurs(f"{what} belongs to {owner.get('kind')} {owner.get('name')}: rename this graph")


def _state(item: Object) -> int:
    """Grows with each change of the spec, and not of the status where the two are told apart."""
    metadata = item["metadata"]
    return int(metadata.get("generation") or metadata["resourceVersion"])
