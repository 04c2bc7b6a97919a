"""Explains in the manifest's terms why the API server refused an object.

The server names a field of the object that it received, such as
`spec.template.spec.containers[0].env[5].name` of a Deployment. Users know their manifest:
`extraPodSpec.mainContainer.env[A].name` of a service.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from penstock.kubernetes.api import ApiError, Object, name_of
from penstock.operator.names import MAIN

_PATTERN = re.compile(r" \((?:e\.g\.|regex used).*?'\)")
"""An example and a regular expression in a message, which are longer than the rest."""

_PREFIX = re.compile(r'^\S+ "[^"]*" is invalid: ')
_INDEXED = re.compile(r"^(\w+)\[(\d+)\]$")
_PLACES = (
    ("spec.template.spec.", "extraPodSpec."),
    ("spec.template.metadata.", "extraPodMetadata."),
    ("spec.template.labels", "labels"),
    ("metadata.labels", "labels"),
    ("spec.template.annotations", "annotations"),
    ("metadata.annotations", "annotations"),
)
_OF_SERVICES = frozenset({"resources", "livenessProbe", "readinessProbe"})
"""Fields of a container that a manifest may have in the service itself."""


def in_words(error: ApiError, item: Object, service: str, given: Mapping[str, Any]) -> str:
    """The error message, with the service and the field.

    Args:
        item: the refused object.
        service: the key of the object's service in the manifest; empty if the object is the graph's.
        given: that service in the manifest.
    """
    lines = []
    for field, message in error.causes:
        place = _in_manifest(field, item, given) if service else field
        lines.append(f"{place}: {message}" if place else message)
    lines = list(dict.fromkeys(lines)) or [_PREFIX.sub("", str(error))]
    problem = "; ".join(_PATTERN.sub("", line) for line in lines)
    what = f"the API server refuses {item['kind']} {name_of(item)}"
    return f"spec.services.{service}: {what}: {problem}" if service else f"{what}: {problem}"


def _in_manifest(field: str, item: Object, given: Mapping[str, Any]) -> str:
    named = _by_name(field, item)
    for prefix, place in _PLACES:
        if named.startswith(prefix):
            named = place + named.removeprefix(prefix)
            break
    main = f"extraPodSpec.containers[{MAIN}]."
    if not named.startswith(main):
        return named
    of_container = named.removeprefix(main)
    first = re.split(r"[.\[]", of_container)[0]
    if first in _OF_SERVICES and given.get(first):
        return of_container
    return f"extraPodSpec.mainContainer.{of_container}"


def _by_name(field: str, item: Object) -> str:
    """The path with names in place of indices where list items have names. Indices would count items that
    are not in the manifest."""
    at: Any = item
    parts = []
    for part in field.split("."):
        indexed = _INDEXED.match(part)
        at = at.get(indexed[1] if indexed else part) if isinstance(at, dict) else None
        if indexed:
            number = int(indexed[2])
            at = at[number] if isinstance(at, list) and number < len(at) else None
            name = at.get("name") if isinstance(at, dict) else None
            part = f"{indexed[1]}[{name}]" if name else part
        parts.append(part)
    return ".".join(parts)
