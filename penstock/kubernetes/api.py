"""What Penstock asks of a Kubernetes API server, as a port.

Objects are dicts, as JSON has them: they pass from manifests through here to the server unchanged, fields
included that this version of Penstock has never heard of. The adapter is `client.py`; tests have a double,
and hold both to the same contract.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any, NamedTuple, Protocol

import msgspec

from penstock.errors import PenstockError

Object = dict[str, Any]
"""A Kubernetes object, or a part of one."""


class Kind(msgspec.Struct, frozen=True):
    """One kind of objects.

    Args:
        group: empty for the core API.
        plural: what it is called in URLs.
        namespaced: whether each object is in a namespace.
    """

    group: str
    version: str
    name: str
    plural: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    def __str__(self) -> str:
        return f"{self.plural}.{self.group}" if self.group else self.plural


class Listing(NamedTuple):
    """All objects of a kind at one moment; a watch may go on from its `resource_version`."""

    items: list[Object]
    resource_version: str


class Change(NamedTuple):
    """One message of a watch. `type` is ADDED, MODIFIED, DELETED or BOOKMARK; of a bookmark's object only
    the resourceVersion means something."""

    type: str
    object: Object


class LogLine(NamedTuple):
    """A line of a container's log, and when it was written, as the node says it (RFC 3339)."""

    time: str
    text: str


_UNREADABLE = ("failed to convert new object", "failed to create typed patch object")
"""So begins what older servers say, with status 500, of an applied object with a value of a wrong type."""

NAMESPACE_ENDS = "NamespaceTerminating"


class ApiError(PenstockError):
    """The API server refused a call, or could not be reached.

    Args:
        message: one line, without the object that was sent.
        status: HTTP status; 0 when there was no answer.
        causes: of a refused object, each wrong field and what is wrong with it.
        reason: the server's, such as `AlreadyExists`; NAMESPACE_ENDS where that is the cause.
    """

    def __init__(
        self, message: str, status: int = 0, reason: str = "", causes: tuple[tuple[str, str], ...] = ()
    ) -> None:
        super().__init__(message)
        self.causes = causes
        self.status = status
        self.reason = reason

    @property
    def is_not_found(self) -> bool:
        return self.status == 404

    @property
    def is_conflict(self) -> bool:
        """Somebody else changed or made the object first."""
        return self.status == 409

    @property
    def is_expired(self) -> bool:
        """The resourceVersion to go on from is too old: list again."""
        return self.status == 410

    @property
    def is_forbidden(self) -> bool:
        return self.status == 403

    @property
    def is_of_ending_namespace(self) -> bool:
        """Nothing can be created any more where all is being deleted."""
        return self.is_forbidden and self.reason == NAMESPACE_ENDS

    @property
    def is_refused(self) -> bool:
        """The server will not take this object, however often it is sent."""
        return self.status in (400, 422) or (self.status == 500 and str(self).startswith(_UNREADABLE))


class Api(Protocol):
    """An API server. Every call raises ApiError. `namespace` is empty for all namespaces, or for a kind
    that has none; `labels` is a selector such as `app=x,role in (a,b)`."""

    async def serves(self, kind: Kind) -> bool:
        """Whether the server has this kind, in this version."""

    async def list(self, kind: Kind, namespace: str = "", labels: str = "") -> Listing:
        """All objects, consistent at one moment."""

    def watch(
        self, kind: Kind, resource_version: str, namespace: str = "", labels: str = "", timeout_s: int = 300
    ) -> AsyncGenerator[Change, None]:
        """Changes after `resource_version`, for about `timeout_s`; then the iterator ends. A
        resourceVersion that is too old raises an ApiError that `is_expired`."""

    async def get(self, kind: Kind, name: str, namespace: str = "") -> Object: ...

    async def create(self, kind: Kind, new: Object) -> Object:
        """Raises a conflict where the name is taken."""

    async def replace(self, kind: Kind, changed: Object) -> Object:
        """Write the object if nobody has changed it since it was read; else raises a conflict."""

    async def apply(self, kind: Kind, wanted: Object, manager: str, *, subresource: str = "") -> Object:
        """Server-side apply: `manager` owns the fields in `wanted`, takes them from whoever had them, and
        gives up those that it applied before and that are no longer there."""

    async def patch(
        self,
        kind: Kind,
        name: str,
        changes: Mapping[str, Any],
        namespace: str = "",
        *,
        subresource: str = "",
    ) -> Object:
        """JSON merge patch (RFC 7386)."""

    async def delete(self, kind: Kind, name: str, namespace: str = "", *, uid: str = "") -> None:
        """Delete in the background, with what it owns. An object that is not there is no error; one of
        another `uid` stays, and raises a conflict."""

    def logs(
        self,
        name: str,
        namespace: str,
        container: str = "",
        *,
        since: str = "",
        tail_lines: int | None = None,
    ) -> AsyncGenerator[LogLine, None]:
        """What a pod's container has written, and goes on writing, until it ends or the connection does.

        Args:
            container: may be empty where the pod has only one.
            since: RFC 3339; lines of that second are included, all of them.
            tail_lines: begin with so many of the lines that are there already; all when None.
        """

    async def close(self) -> None: ...


def name_of(item: Mapping[str, Any]) -> str:
    return str(item["metadata"]["name"])


def namespace_of(item: Mapping[str, Any]) -> str:
    return str(item["metadata"].get("namespace", ""))


def uid_of(item: Mapping[str, Any]) -> str:
    return str(item["metadata"].get("uid", ""))


def labels_of(item: Mapping[str, Any]) -> Mapping[str, str]:
    return item["metadata"].get("labels") or {}


def annotations_of(item: Mapping[str, Any]) -> Mapping[str, str]:
    return item["metadata"].get("annotations") or {}


def is_being_deleted(item: Mapping[str, Any]) -> bool:
    return "deletionTimestamp" in item["metadata"]
