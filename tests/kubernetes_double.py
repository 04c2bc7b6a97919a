"""A Kubernetes API server in memory: the `Api` port with what Penstock relies on, and nothing else.

`tests/kubernetes_contract.py` holds it to what a real server does. Beyond that contract:

- Lists inside objects are single values, also where a real server merges them by a key.
- There is no schema: nothing is checked, pruned or defaulted but names.
- A pod that is bound to a node stays until `remove`, as if its kubelet still stopped it.
- What owners leave behind is collected at once.

Failures are injected by its methods: `disconnect`, `freeze`, `end_watches`, `compact`, `fail_next`.
"""

from __future__ import annotations

import asyncio
import copy
import re
import secrets
from collections.abc import AsyncGenerator, Callable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from penstock.clock import Clock, MonotonicClock
from penstock.kubernetes import kinds
from penstock.kubernetes.api import (
    Api,
    ApiError,
    Change,
    Kind,
    Listing,
    LogLine,
    Object,
    is_being_deleted,
    labels_of,
    name_of,
    namespace_of,
    uid_of,
)
from tests.kubernetes_rules import (
    OF_THE_SERVER,
    Path,
    leaves,
    merged,
    remove_value,
    selector,
    set_value,
    value_at,
)

CALL_S = 10.0
"""After so long without an answer, a call fails, as the adapter's do."""

NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_Key = tuple[str, str, str]  # kind, namespace, name


def _plurals(*found: Kind) -> frozenset[str]:
    return frozenset(str(kind) for kind in found)


WITH_GENERATION = _plurals(
    kinds.GRAPHS,
    kinds.ADAPTERS,
    kinds.DEPLOYMENTS,
    kinds.INGRESSES,
    kinds.DISRUPTION_BUDGETS,
    kinds.LEADER_WORKER_SETS,
)
WITH_STATUS = WITH_GENERATION | _plurals(kinds.PODS, kinds.SERVICES, kinds.VOLUME_CLAIMS)
WITH_SCALE = _plurals(kinds.ADAPTERS, kinds.DEPLOYMENTS)


class _Event(NamedTuple):
    version: int
    kind: str
    before: Object | None
    after: Object | None


class _Log:
    """What one container has written, from its start."""

    def __init__(self) -> None:
        self.lines: list[LogLine] = []
        self.ended = False


class _Failure(NamedTuple):
    verb: str
    error: ApiError


class KubernetesDouble(Api):
    """One API server. `calls` counts what was asked of it, by verb; `writes` what changed something."""

    def __init__(self, clock: Clock | None = None, *, unserved: tuple[Kind, ...] = ()) -> None:
        self.missing_namespaces: set[str] = set()
        self.calls: dict[str, int] = {}
        self.writes: list[tuple[str, str, str]] = []
        self._clock = clock or MonotonicClock()
        self._unserved = {(kind.api_version, kind.plural) for kind in unserved}
        self._objects: dict[_Key, Object] = {}
        self._owners: dict[_Key, dict[str, set[Path]]] = {}
        self._version = 100
        self._forgotten = self._version  # the latest version of which the history is gone
        self._history: list[_Event] = []
        self._failures: list[_Failure] = []
        self._logs: dict[tuple[str, str, str], _Log] = {}  # by namespace, pod and container
        self._unreachable = ""  # why every call fails now
        self._broken, self._break = "", 0  # why connections were broken, and how often they were
        self._changed = asyncio.Event()  # replaced by a new one with each change
        self._thawed = asyncio.Event()
        self._thawed.set()

    # --- what tests do to it ----------------------------------------------------------------------------

    def disconnect(self, why: str = "connection refused") -> None:
        """End all watches, and fail all calls, until `connect`."""
        self._unreachable = why
        self.end_watches(why)

    def connect(self) -> None:
        self._unreachable = ""

    def freeze(self) -> None:
        """Answer nothing, and keep connections open, until `thaw`."""
        self._thawed.clear()

    def thaw(self) -> None:
        self._thawed.set()
        self._wake()

    def end_watches(self, why: str = "connection reset") -> None:
        """Break all connections that something is read from; new ones work."""
        self._broken, self._break = why, self._break + 1
        self._wake()

    def fail_next(self, verb: str, error: ApiError, times: int = 1) -> None:
        """The next call (or the next `times` calls) of `verb` fails, and changes nothing."""
        self._failures += [_Failure(verb, error)] * times

    def serve(self, kind: Kind) -> None:
        """Serve a kind that was not, as when its definition is installed."""
        self._unserved.discard((kind.api_version, kind.plural))

    def compact(self) -> None:
        """Forget the history: who watches from before must list again."""
        self._forgotten = self._version
        self._history.clear()

    def remove(self, kind: Kind, name: str, namespace: str = "") -> None:
        """Take an object away at once, whatever holds it."""
        self._delete((str(kind), namespace, name))

    def stored(self, kind: Kind, name: str, namespace: str = "") -> Object | None:
        """An object as it is; None when there is none."""
        return copy.deepcopy(self._objects.get((str(kind), namespace, name)))

    def log(self, namespace: str, pod: str, text: str, *, container: str = "main", time: str = "") -> None:
        """Let a container write a line; if it has ended, another one that takes its place."""
        key = namespace, pod, container
        if key not in self._logs or self._logs[key].ended:
            self._logs[key] = _Log()
        now = time or datetime.now(UTC).isoformat().replace("+00:00", "Z")
        self._logs[key].lines.append(LogLine(now, text))
        self._wake()

    def end_log(self, namespace: str, pod: str, *, container: str = "main") -> None:
        """Let a container end: whoever follows its log reaches the end."""
        self._logs.setdefault((namespace, pod, container), _Log()).ended = True
        self._wake()

    # --- the port: reading ------------------------------------------------------------------------------

    async def serves(self, kind: Kind) -> bool:
        await self._answer("serves")
        return (kind.api_version, kind.plural) not in self._unserved

    async def list(self, kind: Kind, namespace: str = "", labels: str = "") -> Listing:
        await self._answer("list", kind)
        matches = selector(labels)
        found = [
            _shown(kind, item)
            for (plural, place, _), item in sorted(self._objects.items())
            if plural == str(kind) and namespace in ("", place) and matches(labels_of(item))
        ]
        return Listing(found, str(self._version))

    async def watch(
        self, kind: Kind, resource_version: str, namespace: str = "", labels: str = "", timeout_s: int = 300
    ) -> AsyncGenerator[Change, None]:
        await self._answer("watch", kind)
        breaks = self._break
        matches = selector(labels)
        seen = int(resource_version)
        ends = self._clock.now() + timeout_s
        while True:
            if self._break != breaks:
                raise ApiError(f"watching {kind}: {self._broken}")
            if seen < self._forgotten:
                raise ApiError(f"too old resource version: {seen} ({self._forgotten})", 410, "Expired")
            if self._thawed.is_set():
                for event in [event for event in self._history if event.version > seen]:
                    seen = event.version
                    change = _change(event, kind, namespace, matches)
                    if change is not None:
                        yield change
                if self._clock.now() >= ends:
                    yield Change("BOOKMARK", {"metadata": {"resourceVersion": str(self._version)}})
                    return
            elif self._clock.now() >= ends + 30:
                raise ApiError(f"watching {kind}: nothing came")
            await self._wait(ends if self._thawed.is_set() else ends + 30)

    async def get(self, kind: Kind, name: str, namespace: str = "") -> Object:
        await self._answer("get", kind)
        return _shown(kind, self._existing(kind, name, namespace))

    async def logs(
        self,
        name: str,
        namespace: str,
        container: str = "",
        *,
        since: str = "",
        tail_lines: int | None = None,
    ) -> AsyncGenerator[LogLine, None]:
        await self._answer("logs")
        breaks = self._break
        self._existing(kinds.PODS, name, namespace)
        log = self._logs.setdefault((namespace, name, container or "main"), _Log())
        read = len(log.lines)
        matching = [line for line in log.lines if line.time[:19] >= since[:19]]
        for line in matching if tail_lines is None else matching[max(0, len(matching) - tail_lines) :]:
            yield line
        while True:
            if self._break != breaks:
                raise ApiError(f"the log of {name}: {self._broken}")
            while read < len(log.lines):
                read += 1
                yield log.lines[read - 1]
            if log.ended or (str(kinds.PODS), namespace, name) not in self._objects:
                return
            await self._wait()

    # --- the port: writing ------------------------------------------------------------------------------

    async def create(self, kind: Kind, new: Object) -> Object:
        await self._answer("create", kind)
        item = copy.deepcopy(new)
        if "name" not in item["metadata"]:
            item["metadata"]["name"] = item["metadata"]["generateName"] + secrets.token_hex(3)[:5]
        key = self._key(kind, namespace_of(item), name_of(item))
        if key in self._objects:
            raise ApiError(f'{kind} "{name_of(item)}" already exists', 409, "AlreadyExists")
        self._insert(kind, key, item)
        self._owners[key] = {"": leaves(item)}
        return self._wrote("create", kind, key)

    async def replace(self, kind: Kind, changed: Object) -> Object:
        await self._answer("replace", kind)
        before = self._existing(kind, name_of(changed), namespace_of(changed))
        if not changed["metadata"].get("resourceVersion"):
            raise ApiError("metadata.resourceVersion: must be specified for an update", 422, "Invalid")
        _check_preconditions(kind, changed, before, name_of(changed))
        return self._update("replace", kind, before, copy.deepcopy(changed))

    async def patch(
        self,
        kind: Kind,
        name: str,
        changes: Mapping[str, Any],
        namespace: str = "",
        *,
        subresource: str = "",
    ) -> Object:
        await self._answer("patch", kind)
        before = self._existing(kind, name, namespace)
        _check_preconditions(kind, changes, before, name)
        if subresource == "scale":
            self._check_subresource(kind, subresource, WITH_SCALE)
            replicas = {"spec": {"replicas": changes["spec"]["replicas"]}}
            return _scale(self._update("scale", kind, before, merged(before, replicas)))
        return self._update("patch", kind, before, merged(before, changes), subresource)

    async def apply(self, kind: Kind, wanted: Object, manager: str, *, subresource: str = "") -> Object:
        await self._answer("apply", kind)
        if wanted.get("apiVersion") != kind.api_version or wanted.get("kind") != kind.name:
            raise ApiError(f"apply: this is no {kind.api_version} {kind.name}", 400, "BadRequest")
        key = self._key(kind, namespace_of(wanted), name_of(wanted))
        before = self._objects.get(key)
        if before is None and subresource:
            raise _not_found(kind, name_of(wanted))
        _check_preconditions(kind, wanted, before, name_of(wanted))
        wanted_leaves = leaves(wanted)
        managers = {name: set(paths) for name, paths in self._owners.get(key, {}).items()}
        owner = f"{manager}/{subresource}"
        given_up = managers.get(owner, set()) - wanted_leaves
        managers[owner] = wanted_leaves
        item = copy.deepcopy(before) if before is not None else {"metadata": {}}
        for path in given_up:
            if not any(path in paths for paths in managers.values()):
                remove_value(item, path)
        for path in wanted_leaves:
            value = value_at(wanted, path)
            if value_at(item, path) != value:
                for name, paths in managers.items():
                    if name != owner:
                        paths.discard(path)
                set_value(item, path, copy.deepcopy(value))
        if before is None:
            item["metadata"] |= {"name": name_of(wanted), "namespace": namespace_of(wanted)}
            self._insert(kind, key, item)
            self._owners[key] = managers
            return self._wrote("apply", kind, key)
        unchanged = managers == self._owners[key]
        self._owners[key] = managers
        return self._update("apply", kind, before, item, subresource, even_if_same=not unchanged)

    async def delete(self, kind: Kind, name: str, namespace: str = "", *, uid: str = "") -> None:
        await self._answer("delete", kind)
        key = self._key(kind, namespace, name)
        item = self._objects.get(key)
        if item is None:
            return
        if uid and uid != uid_of(item):
            raise ApiError(f'{kind} "{name}": the UID in the precondition differs', 409, "Conflict")
        if is_being_deleted(item):
            return
        self.writes.append(("delete", str(kind), name))
        stays = item["metadata"].get("finalizers") or (kind == kinds.PODS and item["spec"].get("nodeName"))
        if not stays:
            self._delete(key)
            return
        marked = copy.deepcopy(item)
        marked["metadata"]["deletionTimestamp"] = _now()
        if "generation" in marked["metadata"]:
            marked["metadata"]["generation"] += 1
        self._store(key, marked)

    async def close(self) -> None:
        pass

    # --- inside -----------------------------------------------------------------------------------------

    async def _answer(self, verb: str, kind: Kind | None = None) -> None:
        """Whatever comes before an answer."""
        self.calls[verb] = self.calls.get(verb, 0) + 1
        if not self._thawed.is_set():
            gives_up = self._clock.now() + CALL_S
            while not self._thawed.is_set():
                if self._clock.now() >= gives_up:
                    raise ApiError(f"{verb}: no answer in {CALL_S:g} s")
                await self._wait(gives_up)
        else:
            await asyncio.sleep(0)
        if self._unreachable:
            raise ApiError(f"{verb}: {self._unreachable}")
        failure = next((failure for failure in self._failures if failure.verb == verb), None)
        if failure is not None:
            self._failures.remove(failure)
            raise failure.error
        if kind is not None and (kind.api_version, kind.plural) in self._unserved:
            raise ApiError("the server could not find the requested resource", 404, "NotFound")

    async def _wait(self, until: float | None = None) -> None:
        """For a change, or for a time."""
        changed = asyncio.ensure_future(self._changed.wait())
        waits = [changed]
        if until is not None:
            waits.append(asyncio.ensure_future(self._clock.sleep(max(0.0, until - self._clock.now()))))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _key(self, kind: Kind, namespace: str, name: str) -> _Key:
        if bool(namespace) != kind.namespaced:
            raise ApiError("the server does not allow this method on the requested resource", 405)
        if not NAME.fullmatch(name):
            raise ApiError(f'{kind} "{name}" is invalid: metadata.name', 422, "Invalid")
        if namespace in self.missing_namespaces:
            raise ApiError(f'namespaces "{namespace}" not found', 404, "NotFound")
        return str(kind), namespace, name

    def _existing(self, kind: Kind, name: str, namespace: str) -> Object:
        found = self._objects.get((str(kind), namespace, name))
        if found is None:
            raise _not_found(kind, name)
        return found

    def _check_subresource(self, kind: Kind, subresource: str, having: frozenset[str]) -> None:
        if str(kind) not in having:
            raise ApiError(f"{kind} has no /{subresource}", 404, "NotFound")

    def _insert(self, kind: Kind, key: _Key, item: Object) -> None:
        metadata = {name: value for name, value in item["metadata"].items() if name not in OF_THE_SERVER}
        metadata |= {"uid": secrets.token_hex(16), "creationTimestamp": _now()}
        if key[0] in WITH_GENERATION:
            metadata["generation"] = 1
        if not metadata.get("namespace"):
            metadata.pop("namespace", None)
        item["metadata"] = metadata
        if key[0] in WITH_STATUS:
            item.pop("status", None)
        if kind == kinds.PODS:
            item["status"] = {"phase": "Pending"}
        item |= {"apiVersion": kind.api_version, "kind": kind.name}
        self._store(key, item)

    def _update(
        self,
        verb: str,
        kind: Kind,
        before: Object,
        item: Object,
        subresource: str = "",
        *,
        even_if_same: bool = False,
    ) -> Object:
        """Write what this endpoint may write of `item`."""
        key = self._key(kind, namespace_of(before), name_of(before))
        if subresource:
            self._check_subresource(kind, subresource, WITH_STATUS)
            item = {**copy.deepcopy(before), **({"status": item["status"]} if "status" in item else {})}
        elif key[0] in WITH_STATUS:
            item.pop("status", None)
            if "status" in before:
                item["status"] = copy.deepcopy(before["status"])
        for name in OF_THE_SERVER:
            item["metadata"].pop(name, None)
            if name in before["metadata"]:
                item["metadata"][name] = before["metadata"][name]
        item |= {"apiVersion": before["apiVersion"], "kind": before["kind"]}
        if item == before and not even_if_same:
            return _shown(kind, before)
        if key[0] in WITH_GENERATION and _spec_of(item) != _spec_of(before):
            item["metadata"]["generation"] += 1
        if verb != "apply":
            self._disown(key, before, item)
        if is_being_deleted(item) and not item["metadata"].get("finalizers"):
            self._delete(key)
            return _shown(kind, item)
        self._store(key, item)
        return self._wrote(verb + (f" {subresource}" if subresource else ""), kind, key)

    def _disown(self, key: _Key, before: Object, item: Object) -> None:
        """What was written without apply belongs to the writer, and to nobody who applied it."""
        changed = {
            path for path in leaves(before) | leaves(item) if value_at(before, path) != value_at(item, path)
        }
        for paths in self._owners[key].values():
            paths -= changed
        self._owners[key].setdefault("", set()).update(changed & leaves(item))

    def _wrote(self, verb: str, kind: Kind, key: _Key) -> Object:
        self.writes.append((verb, str(kind), key[2]))
        return _shown(kind, self._objects[key])

    def _store(self, key: _Key, item: Object) -> None:
        self._version += 1
        item["metadata"]["resourceVersion"] = str(self._version)
        self._history.append(_Event(self._version, key[0], self._objects.get(key), item))
        self._objects[key] = item
        self._wake()

    def _delete(self, key: _Key) -> None:
        item = self._objects.pop(key)
        self._owners.pop(key, None)
        self._version += 1
        last = {**item, "metadata": {**item["metadata"], "resourceVersion": str(self._version)}}
        self._history.append(_Event(self._version, key[0], last, None))
        self._wake()
        alive = {uid_of(other) for other in self._objects.values()}
        for other, dependent in list(self._objects.items()):
            owners = dependent["metadata"].get("ownerReferences")
            if owners and other in self._objects and not any(owner["uid"] in alive for owner in owners):
                self._delete(other)


def _change(
    event: _Event, kind: Kind, namespace: str, matches: Callable[[Mapping[str, str]], bool]
) -> Change | None:
    """What a watch with this namespace and selector says of an event."""

    def concerns(item: Object | None) -> bool:
        return item is not None and namespace in ("", namespace_of(item)) and matches(labels_of(item))

    if event.kind != str(kind):
        return None
    before, after = concerns(event.before), concerns(event.after)
    if after:
        return Change("MODIFIED" if before else "ADDED", _shown(kind, event.after or {}))
    if not before:
        return None
    gone = _shown(
        kind, event.after or event.before or {}
    )  # the labels that it left with, or its last state
    return Change("DELETED", gone)


def _shown(kind: Kind, item: Object) -> Object:
    return {**copy.deepcopy(item), "apiVersion": kind.api_version, "kind": kind.name}


def _scale(item: Object) -> Object:
    return {
        "apiVersion": "autoscaling/v1",
        "kind": "Scale",
        "metadata": item["metadata"],
        "spec": {"replicas": item["spec"].get("replicas", 0)},
        "status": {"replicas": item.get("status", {}).get("replicas", 0)},
    }


def _check_preconditions(kind: Kind, sent: Mapping[str, Any], before: Object | None, name: str) -> None:
    """What was sent may say which object it is meant for, and in which state of it."""
    said = sent.get("metadata", {})
    what = f'{kind} "{name}"'
    if said.get("uid") and before is None:
        raise ApiError(f"Operation cannot be fulfilled on {what}: uid mismatch", 409, "Conflict")
    if before is None:
        return
    if said.get("uid") not in (None, "", uid_of(before)):
        raise ApiError(f"{what} is invalid: metadata.uid: field is immutable", 422, "Invalid")
    if said.get("resourceVersion") not in (None, "", before["metadata"]["resourceVersion"]):
        raise ApiError(f"Operation cannot be fulfilled on {what}: it has been modified", 409, "Conflict")


def _not_found(kind: Kind, name: str) -> ApiError:
    return ApiError(f'{kind} "{name}" not found', 404, "NotFound")


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _spec_of(item: Object) -> Object:
    return {name: value for name, value in item.items() if name not in ("metadata", "status")}
