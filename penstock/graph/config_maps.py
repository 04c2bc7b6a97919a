"""Fills in environment variables that come from a ConfigMap in the same file as the manifest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def with_config_values(graph: Any, objects: Iterable[dict[str, Any]]) -> Any:
    """The graph with values in place of each `valueFrom: {configMapKeyRef: ...}` whose ConfigMap is among
    the objects."""
    maps = {_name(found): found.get("data") for found in objects if found.get("kind") == "ConfigMap"}
    known = {name: data for name, data in maps.items() if isinstance(data, dict)}
    return _resolved(graph, known) if known else graph


def _name(found: dict[str, Any]) -> str:
    metadata = found.get("metadata")
    return str(metadata.get("name")) if isinstance(metadata, dict) else ""


def _resolved(value: Any, maps: dict[str, dict[str, Any]]) -> Any:
    if isinstance(value, list):
        return [_resolved(item, maps) for item in value]
    if not isinstance(value, dict):
        return value
    reference = (
        value["valueFrom"].get("configMapKeyRef") if isinstance(value.get("valueFrom"), dict) else None
    )
    if isinstance(reference, dict):
        found = maps.get(str(reference.get("name")), {}).get(str(reference.get("key")))
        if isinstance(found, str):
            others = {name: item for name, item in value.items() if name != "valueFrom"}
            return {**others, "value": found}
    return {name: _resolved(item, maps) for name, item in value.items()}
