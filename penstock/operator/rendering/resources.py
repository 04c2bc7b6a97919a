"""The resource requests and limits of a replica."""

from __future__ import annotations

from penstock.graph.manifest import Amounts
from penstock.kubernetes.api import Object
from penstock.operator.rendering.service_plan import ServicePlan

_GPU = "nvidia.com/gpu"
_PLAIN = ("cpu", "memory")

_LEAST = {"cpu": "100m", "memory": "256Mi"}
"""Requests where the manifest has none, so that the scheduler counts the pod at all. There are no default
limits: those of the manifest API, half a core and 1 GiB, would slow every frontend and kill every
engine."""


def resources(plan: ServicePlan) -> Object:
    """The manifest's amounts. They are dropped if an annotation replaced the engine that they are for."""
    given = plan.spec.resources
    if given is None or plan.sized_for_other_engine:
        return {"requests": dict(_LEAST)}
    requests = _amounts(plan, given.requests)
    limits = _amounts(plan, given.limits)
    # Devices cannot be overcommitted: the API requires the same number in requests and limits.
    for name, amount in requests.items():
        if name not in _PLAIN:
            limits.setdefault(name, amount)
    found: Object = {}
    if requests:
        found["requests"] = requests
    if limits:
        found["limits"] = limits
    if given.claims:
        found["claims"] = list(given.claims)
    return found or {"requests": dict(_LEAST)}


def own_resources(plan: ServicePlan) -> Object:
    """The amounts of the manifest's mainContainer. They are for the engine that the manifest names, too."""
    if plan.sized_for_other_engine:
        return {}
    return {
        kind: {name: amount for name, amount in amounts.items() if plan.needs_gpu_stack or name != _GPU}
        if isinstance(amounts, dict)
        else amounts
        for kind, amounts in (plan.container.get("resources") or {}).items()
    }


def spared_amounts(plan: ServicePlan) -> list[str]:
    """The names of the manifest's amounts that the pod does not request."""
    given = plan.spec.resources
    both = (given.requests, given.limits) if given is not None else ()
    stated = [name for amounts in both if amounts is not None for name in _stated(amounts)]
    stated += _names_in(plan.container.get("resources") or {})
    if plan.sized_for_other_engine:
        return list(dict.fromkeys(stated))
    kept = {*_names_in(resources(plan)), *_names_in(own_resources(plan))}
    return [name for name in dict.fromkeys(stated) if name not in kept]


def _names_in(found: Object) -> list[str]:
    return [name for part in ("requests", "limits") for name in found.get(part) or ()]


def _amounts(plan: ServicePlan, amounts: Amounts | None) -> dict[str, str]:
    if amounts is None:
        return {}
    stated = _stated(amounts)
    if not plan.needs_gpu_stack:
        stated.pop(amounts.gpu_type or _GPU, None)
    return stated


def _stated(amounts: Amounts) -> dict[str, str]:
    stated = {name: getattr(amounts, name) for name in _PLAIN if getattr(amounts, name) is not None}
    if amounts.gpu is not None and amounts.gpu != "0":
        stated[amounts.gpu_type or _GPU] = amounts.gpu
    return stated | amounts.custom
