"""Rules of a Kubernetes API server that need no server: label selectors, merge patches, and which fields an
object has."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

from penstock.kubernetes.api import Object

Path = tuple[str, ...]
"""Names of fields, from an object down to one of its values. Lists are values."""

OF_THE_SERVER = ("uid", "creationTimestamp", "deletionTimestamp", "generation", "resourceVersion")
"""What only the server writes into `metadata`."""

_IDENTITY = {("apiVersion",), ("kind",), ("metadata", "name"), ("metadata", "namespace")}


def selector(text: str) -> Callable[[Mapping[str, str]], bool]:
    """A label selector as a function of labels."""
    tests = [_requirement(part.strip()) for part in re.split(r",(?![^(]*\))", text) if part.strip()]
    return lambda labels: all(test(labels) for test in tests)


def _requirement(text: str) -> Callable[[Mapping[str, str]], bool]:
    if match := re.fullmatch(r"(\S+)\s+(in|notin)\s+\((.*)\)", text):
        values = {value.strip() for value in match[3].split(",")}
        return lambda labels: (labels.get(match[1]) in values) == (match[2] == "in")
    if match := re.fullmatch(r"([^!=\s]+)\s*(==?|!=)\s*(\S*)", text):
        return lambda labels: (labels.get(match[1]) == match[3]) == (match[2] != "!=")
    if text.startswith("!"):
        return lambda labels: text[1:] not in labels
    return lambda labels: text in labels


def merged(target: Any, changes: Any) -> Any:
    """RFC 7386."""
    if not isinstance(changes, Mapping):
        return copy.deepcopy(changes)
    result = copy.deepcopy(target) if isinstance(target, dict) else {}
    for name, value in changes.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merged(result.get(name), value)
    return result


def leaves(item: Any, at: Path = ()) -> set[Path]:
    """The paths of all values that somebody chose; not of those that name the object."""
    if isinstance(item, dict) and item:
        return {path for name, value in item.items() for path in leaves(value, (*at, name))}
    of_the_server = at[:1] == ("metadata",) and at[-1] in OF_THE_SERVER
    return set() if at in _IDENTITY or of_the_server else {at}


def value_at(item: Any, path: Path) -> Any:
    for name in path:
        if not isinstance(item, dict) or name not in item:
            return None
        item = item[name]
    return item


def set_value(item: Object, path: Path, value: Any) -> None:
    for name in path[:-1]:
        if not isinstance(item.get(name), dict):
            item[name] = {}
        item = item[name]
    item[path[-1]] = value


def remove_value(item: Object, path: Path) -> None:
    """Remove a value, and each dict that is empty without it."""
    holder = value_at(item, path[:-1])
    if isinstance(holder, dict):
        holder.pop(path[-1], None)
        if not holder and len(path) > 1:
            remove_value(item, path[:-1])
