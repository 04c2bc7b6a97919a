"""The port to a Kubernetes API server, and its types.

Objects are dicts, as in JSON. They go from manifests to the server unchanged, including fields that this
version of Penstock does not know. The adapter is `client.py`. The tests have a double of it, and check both
against one contract.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any, NamedTuple, Protocol

import msgspec

from penstock.errors import PenstockError

Object = dict[str, Any]
"""A Kubernetes object, or a part of one."""


class Kind(msgspec.Struct, frozen=True):
    """A kind of objects, in one version.

    Args:
        group: empty for the core API.
        plural: the kind's name in URLs.
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
    """All objects of a kind at one moment. A watch can continue from `resource_version`."""

    items: list[Object]
    resource_version: str


class Change(NamedTuple):
    """A message of a watch. `type` is ADDED, MODIFIED, DELETED or BOOKMARK. In a BOOKMARK, only the
    object's resourceVersion has a meaning."""

    type: str
    object: Object


class LogLine(NamedTuple):
    """A line of a container's log, with the time at which the node recorded it (RFC 3339)."""

    time: str
    text: str


_UNREADABLE = ("failed to convert new object", "failed to create typed patch object")
"""Beginnings of the messages with which older servers refuse, with status 500, values of a wrong type."""

NAMESPACE_ENDS = "NamespaceTerminating"


class ApiError(PenstockError):
    """The API server refused a call, or could not be reached.

    Args:
        message: one line, without the object that was sent.
        status: HTTP status; 0 when there was no answer.
        causes: the wrong fields of a refused object, each with what is wrong with it.
        reason: the server's reason, such as `AlreadyExists`; NAMESPACE_ENDS if that is a cause.
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
        """Another client changed or created the object first."""
        return self.status == 409

    @property
    def is_expired(self) -> bool:
        """The resourceVersion of a watch is too old: the caller must list again."""
        return self.status == 410

    @property
    def is_forbidden(self) -> bool:
        return self.status == 403

    @property
    def is_of_ending_namespace(self) -> bool:
        """The namespace is being deleted, so nothing can be created in it."""
        return self.is_forbidden and self.reason == NAMESPACE_ENDS

    @property
    def is_refused(self) -> bool:
        """The server refuses this object, and would refuse it again."""
        return self.status in (400, 422) or (self.status == 500 and str(self).startswith(_UNREADABLE))


class Api(Protocol):
    """An API server. Every call may raise ApiError. An empty `namespace` means all namespaces, or a kind
    without namespaces. `labels` is a selector such as `app=x,role in (a,b)`."""

    async def serves(self, kind: Kind) -> bool:
        """Whether the server serves this kind in this version."""

    async def list(self, kind: Kind, namespace: str = "", labels: str = "") -> Listing:
        """All objects, as of one moment."""

    def watch(
        self, kind: Kind, resource_version: str, namespace: str = "", labels: str = "", timeout_s: int = 300
    ) -> AsyncGenerator[Change, None]:
        """Yield the changes after `resource_version`, for about `timeout_s`. If the resourceVersion is too
        old, raises an ApiError that `is_expired`."""

    async def get(self, kind: Kind, name: str, namespace: str = "") -> Object: ...

    async def create(self, kind: Kind, new: Object) -> Object:
        """Create an object. Raises a conflict if the name is taken."""

    async def replace(self, kind: Kind, changed: Object) -> Object:
        """Write the object if it has not changed since it was read; else raises a conflict."""

    async def apply(self, kind: Kind, wanted: Object, manager: str, *, subresource: str = "") -> Object:
        """Server-side apply: `manager` becomes the owner of the fields in `wanted`, even if others own
        them, and gives up the fields that it applied before and that are no longer in `wanted`."""

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
        """Delete an object, and in the background the objects that it owns. A missing object is no error.
        If the object has another `uid`, raises a conflict and deletes nothing."""

    def logs(
        self,
        name: str,
        namespace: str,
        container: str = "",
        *,
        since: str = "",
        tail_lines: int | None = None,
    ) -> AsyncGenerator[LogLine, None]:
        """Yield the log of a container, and follow it until the container or the connection ends.

        Args:
            container: may be empty if the pod has only one.
            since: RFC 3339; all lines of that second are included.
            tail_lines: begin with this many of the lines already written; None: with all.
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
