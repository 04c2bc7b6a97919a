"""The security contexts of pods and containers. The defaults comply with the restricted pod security
standard.

A manifest's security contexts are merged over the defaults. Defaults that contradict them are then removed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.kubernetes.api import Object
from penstock.operator import names

_ALMOST_PRIVILEGED = {"SYS_ADMIN", "CAP_SYS_ADMIN"}


def pod_security() -> Object:
    """The security context of a pod. The owner of a volume's files is changed only if it is wrong: for a
    million files that takes minutes at each start."""
    return {
        "runAsNonRoot": True,
        "runAsUser": names.USER_ID,
        "runAsGroup": names.USER_ID,
        "fsGroup": names.USER_ID,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security(*, writes_anywhere: bool) -> Object:
    """The security context of a container."""
    context: Object = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    return context if writes_anywhere else context | {"readOnlyRootFilesystem": True}


def pod_security_with(context: Object, own: Mapping[str, Any], container: Mapping[str, Any]) -> Object:
    """A pod's context after merging. If the manifest asks for root, the default that forbids root is
    removed, since the pod could not start.

    Args:
        own: the manifest's context of the pod.
        container: the manifest's context of the container.
    """
    asks_for_root = 0 in (own.get("runAsUser"), container.get("runAsUser"))
    return _without("runAsNonRoot", context) if asks_for_root and "runAsNonRoot" not in own else context


def container_security_with(context: Object, own: Mapping[str, Any]) -> Object:
    """A container's context after merging. For a privileged container, the API refuses
    `allowPrivilegeEscalation: false`, so that default is removed."""
    added = (own.get("capabilities") or {}).get("add") or []
    privileged = own.get("privileged") or _ALMOST_PRIVILEGED & set(added)
    takes_back = privileged and "allowPrivilegeEscalation" not in own
    return _without("allowPrivilegeEscalation", context) if takes_back else context


def _without(field: str, context: Object) -> Object:
    return {name: value for name, value in context.items() if name != field}
