"""Renders the rights of a graph's pods at the API server: frontends may find pods, log relays may read
logs."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.kubernetes.api import Object
from penstock.operator import names

_RBAC = "rbac.authorization.k8s.io"
_FIND_PODS = {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
_READ_LOGS = {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]}


def frontend_access(graph: str, namespace: str, own_accounts: Sequence[str]) -> list[Object]:
    """The rights of frontends to find workers. ServiceAccounts that the manifest names get them as well.

    Args:
        own_accounts: for each frontend, the account that the manifest names; empty if it names none.
    """
    name = names.frontend_account(graph)
    accounts = sorted({account or name for account in own_accounts})
    objects = _access(graph, "frontend", name, [_FIND_PODS], namespace, accounts)
    return objects if name in accounts else objects[1:]


def relay_access(graph: str, namespace: str) -> list[Object]:
    """The rights of log relays to find pods and read their logs."""
    name = names.log_relay(graph)
    return _access(graph, "log-relay", name, [_FIND_PODS, _READ_LOGS], namespace, [name])


def _access(
    graph: str, component: str, name: str, rules: list[Object], namespace: str, accounts: Sequence[str]
) -> list[Object]:
    """A ServiceAccount, a Role, and a RoleBinding that grants the Role to the accounts."""
    about = {"name": name, "labels": names.common_labels(graph, component)}
    subjects = [{"kind": "ServiceAccount", "name": account} for account in accounts]
    if namespace:
        subjects = [subject | {"namespace": namespace} for subject in subjects]
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": about},
        {"apiVersion": f"{_RBAC}/v1", "kind": "Role", "metadata": about, "rules": rules},
        {
            "apiVersion": f"{_RBAC}/v1",
            "kind": "RoleBinding",
            "metadata": about,
            "roleRef": {"apiGroup": _RBAC, "kind": "Role", "name": name},
            "subjects": subjects,
        },
    ]
