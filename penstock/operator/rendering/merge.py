"""Merges a manifest's part of an object over the operator's, as `kubectl patch` does: the manifest wins.

Objects are merged field by field. Lists whose items have a name or a path are merged item by item, so that
a further volume does not remove the operator's. Other lists are replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "imagePullSecrets": "name",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "ports": "containerPort",
}
"""By the field of a list: the key that identifies its items."""

_APPENDED = frozenset({"tolerations", "envFrom"})
_ITEMS_MERGED = frozenset({"containers", "initContainers", "ports"})
"""Lists whose items are merged. In other lists an item is replaced: a volume with two sources is
invalid."""

_ONE_CHOICE = frozenset({"livenessProbe", "readinessProbe", "startupProbe", "preStop", "postStart"})
"""Objects that are replaced as a whole: a mixture of two would be invalid."""


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base`, overridden by the fields of `over` that are not null."""
    result = dict(base)
    for field, value in over.items():
        if value is not None:
            result[field] = _merged_field(field, result.get(field), value)
    return result


def _merged_field(field: str, base: Any, value: Any) -> Any:
    if base is None or field in _ONE_CHOICE:
        return value
    if isinstance(base, Mapping) and isinstance(value, Mapping):
        return merged(base, value)
    if isinstance(base, Sequence) and isinstance(value, Sequence) and not isinstance(value, str):
        if field in _APPENDED:
            return [*base, *value]
        if field in _KEYS:
            return _merged_items(base, value, _KEYS[field], merged if field in _ITEMS_MERGED else _second)
    return value


def _merged_items(
    base: Sequence[Mapping[str, Any]],
    over: Sequence[Mapping[str, Any]],
    key: str,
    merge: Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]],
) -> list[Mapping[str, Any]]:
    result = {item.get(key): item for item in base}
    for item in over:
        name = item.get(key)
        result[name] = merge(result[name], item) if name in result else item
    return list(result.values())


def _second(_base: Mapping[str, Any], item: Mapping[str, Any]) -> Mapping[str, Any]:
    return item
