"""All objects of one kind, kept as the API server has them: a list, then a watch of its changes.

A watch that ends goes on from where it was; one that fails begins with a new list, and what that list no
longer has is reported as gone. So whoever follows a reflector hears of every object's latest state, though
not of each state in between. While the server is away, the last known objects stay.

A server that says nothing at all looks like one where nothing happens. Hence a watch is ended every
`watch_s`, by the server; one that outlives that is given up by the client.
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
"""Called with an object before and after: None before for a new one, None after for one that is gone."""


class ReflectorSettings(msgspec.Struct, frozen=True):
    """Times of a reflector.

    watch_s: how long one watch lasts. The longest that a silent server is taken for a calm one.
    lasting_s: a watch that ended sooner counts as failed.
    retry_min_s, retry_max_s: pause after a failure; doubles with each, and is jittered.
    """

    watch_s: int = 60
    lasting_s: float = 1.0
    retry_min_s: float = 0.2
    retry_max_s: float = 10.0


class Reflector:
    """The objects of `kind` in `namespace` (empty: in all) that match `labels`.

    Args:
        on_change: called for each change, after `items` has it. Must not raise.
        on_synced: called after each whole list.
        trim: what is kept of each object; by default all but `managedFields`, which is half of it.
        index: what `found` finds an object by.
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
        """The objects of which `index` says this value."""
        return list(self._found.get(value, {}).values())

    async def run(self) -> None:
        """Follow the server until cancelled."""
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
            # One that ends at once, again and again, is cut by something in between, or not allowed at all.
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
            # Deleted and made again while nobody looked: another object.
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
            # A watch broke. Whether the server is away, the next list will tell.
            self._version = ""
            if not error.is_expired:  # else the server has just forgotten changes of some minutes ago
                log.info("%s: the watch ended, all of them are listed again: %s", self.kind, error)
            return
        reason = str(error)
        if not self._failing:
            self._failed_at = self._clock.now()
            meanwhile = "what is known stays" if self.synced else "nothing is known yet"
            log.warning("%s: the API server does not answer, %s: reason=%r", self.kind, meanwhile, reason)
        self._failing = True
        self.trouble = reason

    def _pause_s(self, failures: int) -> float:
        settings = self._settings
        longest_s = min(settings.retry_min_s * 2.0 ** min(failures - 1, 16), settings.retry_max_s)
        return longest_s * random.uniform(0.5, 1.0)


def without_managed_fields(item: Object) -> Object:
    """The object without the record of who set which field."""
    item["metadata"].pop("managedFields", None)
    return item
