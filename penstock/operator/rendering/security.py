"""What pods and their containers may do: as little as the restricted pod security standard, by default.

A manifest's own wishes are merged over these. Defaults that make no sense beside one are then taken back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.kubernetes.api import Object
from penstock.operator import names

_ALMOST_PRIVILEGED = {"SYS_ADMIN", "CAP_SYS_ADMIN"}


def pod_security() -> Object:
    """Of a pod. A large volume keeps its files' owner where that is right already: to change a million
    files takes minutes at each start."""
    return {
        "runAsNonRoot": True,
        "runAsUser": names.USER_ID,
        "runAsGroup": names.USER_ID,
        "fsGroup": names.USER_ID,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security(*, writes_anywhere: bool) -> Object:
    """Of a container."""
    context: Object = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    return context if writes_anywhere else context | {"readOnlyRootFilesystem": True}


def pod_security_with(context: Object, own: Mapping[str, Any], container: Mapping[str, Any]) -> Object:
    """A pod's, after merging. Who asks for root gets it: the default that forbids it would keep the pod
    from starting.

    Args:
        own: the manifest's of the pod.
        container: the manifest's of the container.
    """
    asks_for_root = 0 in (own.get("runAsUser"), container.get("runAsUser"))
    return _without("runAsNonRoot", context) if asks_for_root and "runAsNonRoot" not in own else context


def container_security_with(context: Object, own: Mapping[str, Any]) -> Object:
    """A container's, after merging. The API refuses to keep a privileged one from getting privileges."""
    added = (own.get("capabilities") or {}).get("add") or []
    privileged = own.get("privileged") or _ALMOST_PRIVILEGED & set(added)
    takes_back = privileged and "allowPrivilegeEscalation" not in own
    return _without("allowPrivilegeEscalation", context) if takes_back else context


def _without(field: str, context: Object) -> Object:
    return {name: value for name, value in context.items() if name != field}
