"""A user's part of an object over the operator's, as `kubectl patch` merges: what people wrote wins.

Objects merge field by field. Lists whose items have a name or a path of their own merge item by item, so
that one more volume does not displace the operator's; other lists replace each other.
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
"""By a list's field: what tells its items apart."""

_APPENDED = frozenset({"tolerations", "envFrom"})
_ITEMS_MERGED = frozenset({"containers", "initContainers", "ports"})
"""Lists whose items merge too. In the others an item is one choice: a volume with two sources is none."""

_ONE_CHOICE = frozenset({"livenessProbe", "readinessProbe", "startupProbe", "preStop", "postStart"})
"""Objects of which a user's replaces the operator's: half of each would be neither."""


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with all that `over` says; nulls in it say nothing."""
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
