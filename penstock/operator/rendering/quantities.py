"""Finds invalid amounts in a manifest. Valid ones are `500m` or `16Gi`, for example.

For an invalid amount the API server would refuse the whole object, with a message that does not name the
field.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from penstock.checked import shown

_QUANTITY = re.compile(r"\+?(\d+(\.\d*)?|\.\d+)([KMGTPE]i|[numkMGTPE]|[eE][-+]?\d+)?")


def wrong_quantities(spec: Mapping[str, Any]) -> list[str]:
    """A line for each invalid amount in the `spec` of a graph."""
    return [
        f"{path}: expected an amount such as 500m, 2 or 16Gi, got {shown(value)}"
        for path, value in _quantities(spec)
        if isinstance(value, str) and not _QUANTITY.fullmatch(value)
    ]


def _quantities(spec: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for index, claim in enumerate(spec.get("pvcs") or ()):
        yield f"spec.pvcs[{index}].size", claim.get("size")
    for name, service in spec["services"].items():
        where = f"spec.services.{name}"
        for index, claim in enumerate(service.get("pvcs") or ()):
            yield f"{where}.pvcs[{index}].size", claim.get("size")
        yield f"{where}.sharedMemory.size", (service.get("sharedMemory") or {}).get("size")
        yield from _of_resources(f"{where}.resources", service.get("resources"))
        pod = service.get("extraPodSpec") or {}
        main = pod.get("mainContainer") or {}
        yield from _of_resources(f"{where}.extraPodSpec.mainContainer.resources", main.get("resources"))
        for index, volume in enumerate(pod.get("volumes") or ()):
            folder = volume.get("emptyDir") if isinstance(volume, dict) else None
            if isinstance(folder, dict):
                path = f"{where}.extraPodSpec.volumes[{index}].emptyDir.sizeLimit"
                yield path, folder.get("sizeLimit")


def _of_resources(path: str, resources: Any) -> Iterator[tuple[str, Any]]:
    """The amounts of a `resources` field, without GPUs and nodes, which are checked elsewhere."""
    for part in ("requests", "limits"):
        amounts = resources.get(part) if isinstance(resources, dict) else None
        if not isinstance(amounts, dict):
            continue  # of a wrong type, which the API server reports
        for name, value in amounts.items():
            if name == "custom":
                yield from ((f"{path}.{part}.custom.{one}", given) for one, given in (value or {}).items())
            elif name not in ("gpu", "gpuType", "nodes"):
                yield f"{path}.{part}.{name}", value
