"""A cache of all objects of one kind, kept up to date: the reflector lists the objects, then watches their
changes.

A watch that ends is continued where it ended. After a watch that failed, the objects are listed again, and
those that are no longer listed are reported as deleted. So the callbacks report the latest state of every
object, though not each state in between. While the server does not answer, the last known objects stay.

A server that sends nothing looks like one where nothing changes. So the server ends a watch after
`watch_s`, and the client gives up a watch that lasts longer.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Iterator

import msgspec

from penstock.clock import Clock, MonotonicClock
from penstock.kubernetes.api import Api, ApiError, Change, Kind, Object, name_of, namespace_of, uid_of

log = logging.getLogger(__name__)

Key = tuple[str, str]
"""Namespace and name."""

OnChange = Callable[[Object | None, Object | None], None]
"""Called with an object before and after a change. Before is None for a new object, after for a deleted
one."""


class ReflectorSettings(msgspec.Struct, frozen=True):
    """The times of a reflector.

    watch_s: how long one watch lasts; the longest time for which a dead server goes unnoticed.
    lasting_s: a watch that ended sooner counts as failed.
    retry_min_s, retry_max_s: pause after a failure; it doubles with each failure, and is jittered.
    """

    watch_s: int = 60
    lasting_s: float = 1.0
    retry_min_s: float = 0.2
    retry_max_s: float = 10.0


class Reflector:
    """The objects of `kind` in `namespace` (empty: in all) that match `labels`.

    Args:
        on_change: called for each change, after `items` was updated. Must not raise.
        on_synced: called after each complete list.
        trim: reduces an object to what is kept; by default `managedFields`, half of an object, are dropped.
        index: the value by which `found` finds an object.
    """

    def __init__(
        self,
        api: Api,
        kind: Kind,
        namespace: str = "",
        labels: str = "",
        *,
        on_change: OnChange = lambda before, after: None,
        on_synced: Callable[[], None] = lambda: None,
        trim: Callable[[Object], Object] | None = None,
        index: Callable[[Object], str] = lambda item: "",
        settings: ReflectorSettings = ReflectorSettings(),  # noqa: B008 - frozen
        clock: Clock | None = None,
    ) -> None:
        self.kind = kind
        self.items: dict[Key, Object] = {}
        self.synced = False
        self.trouble = "not asked yet"
        """Why `items` may be out of date; empty when it is not."""
        self._api = api
        self._namespace = namespace
        self._labels = labels
        self._on_change = on_change
        self._on_synced = on_synced
        self._trim = trim or without_managed_fields
        self._index = index
        self._found: dict[str, dict[Key, Object]] = {}  # `items` by what `index` says of each
        self._settings = settings
        self._clock = clock or MonotonicClock()
        self._version = ""  # where a watch goes on; empty: list first
        self._failing = False  # the latest list failed
        self._failed_at = 0.0  # when the first of the lists that failed since then did

    def __iter__(self) -> Iterator[Object]:
        return iter(self.items.values())

    def get(self, namespace: str, name: str) -> Object | None:
        return self.items.get((namespace, name))

    def found(self, value: str) -> list[Object]:
        """The objects for which `index` returns this value."""
        return list(self._found.get(value, {}).values())

    async def run(self) -> None:
        """Keep the cache up to date until cancelled."""
        failures = 0
        while True:
            began = self._clock.now()
            try:
                if not self._version:
                    await self._list()
                    began = self._clock.now()
                await self._watch()
            except ApiError as error:
                self._fail(error)
                ended_well = False
            else:
                ended_well = True
            # A watch that keeps ending at once is cut by a proxy, or is not permitted.
            lasted = self._clock.now() - began >= self._settings.lasting_s
            if ended_well and lasted:
                failures = 0
                continue
            failures = 1 if lasted else failures + 1
            await self._clock.sleep(self._pause_s(failures))

    async def _list(self) -> None:
        listed = await self._api.list(self.kind, self._namespace, self._labels)
        if self._failing:
            outage_s = self._clock.now() - self._failed_at
            log.info("%s: the API server answers again: outage_s=%.1f", self.kind, outage_s)
        self._failing, self.trouble = False, ""
        current = {(namespace_of(item), name_of(item)): self._trim(item) for item in listed.items}
        for key in [key for key in self.items if key not in current]:
            self._drop(key)
        for key, item in current.items():
            self._put(key, item)
        self._version = listed.resource_version
        self.synced = True
        self._on_synced()

    async def _watch(self) -> None:
        watching = self._api.watch(
            self.kind, self._version, self._namespace, self._labels, self._settings.watch_s
        )
        async with contextlib.aclosing(watching):
            async for change in watching:
                self._take(change)

    def _take(self, change: Change) -> None:
        item = change.object
        self._version = item["metadata"]["resourceVersion"]
        if change.type == "BOOKMARK":
            return
        key = namespace_of(item), name_of(item)
        if change.type != "DELETED":
            self._put(key, self._trim(item))
        elif key in self.items:
            self._drop(key)

    def _put(self, key: Key, item: Object) -> None:
        before = self.items.get(key)
        if before is not None and uid_of(before) != uid_of(item):
            # It was deleted and created again in between: another object.
            self._drop(key)
            before = None
        if before is not None:
            self._unindex(key, before)
        self.items[key] = item
        self._found.setdefault(self._index(item), {})[key] = item
        if before is None or before["metadata"]["resourceVersion"] != item["metadata"]["resourceVersion"]:
            self._on_change(before, item)

    def _drop(self, key: Key) -> None:
        item = self.items.pop(key)
        self._unindex(key, item)
        self._on_change(item, None)

    def _unindex(self, key: Key, item: Object) -> None:
        value = self._index(item)
        of_value = self._found[value]
        del of_value[key]
        if not of_value:
            del self._found[value]

    def _fail(self, error: ApiError) -> None:
        if self._version:
            # A watch failed. The next list shows whether the server answers.
            self._version = ""
            if not error.is_expired:  # else the server has only dropped changes of some minutes ago
                log.info("%s: the watch failed, listing all objects again: %s", self.kind, error)
            return
        reason = str(error)
        if not self._failing:
            self._failed_at = self._clock.now()
            meanwhile = "the last known objects stay" if self.synced else "no object is known yet"
            log.warning("%s: the API server does not answer, %s: reason=%r", self.kind, meanwhile, reason)
        self._failing = True
        self.trouble = reason

    def _pause_s(self, failures: int) -> float:
        settings = self._settings
        longest_s = min(settings.retry_min_s * 2.0 ** min(failures - 1, 16), settings.retry_max_s)
        return longest_s * random.uniform(0.5, 1.0)


def without_managed_fields(item: Object) -> Object:
    """The object without `managedFields`, which record who set which field."""
    item["metadata"].pop("managedFields", None)
    return item
