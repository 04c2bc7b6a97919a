"""Renders the log relays: for each role, a small pod that shows the logs of all pods of that role.

`kubectl logs -l app=GRAPH-prefill` needs pods with that label, and `-l app=GRAPH` needs all serving pods. A
pod cannot have both values. So serving pods have the latter, and log relays the former.
"""

from __future__ import annotations

from penstock.kubernetes.api import Object
from penstock.operator import names
from penstock.operator.rendering.security import container_security, pod_security
from penstock.operator.settings import RenderSettings

_RESOURCES = {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}}
_GRACE_PERIOD_S = 5
_WRITES = {names.HOME_VOLUME: names.HOME, names.TEMPORARY_VOLUME: "/tmp"}
_COMPONENT = "log-relay"


def log_relay(graph: str, role: str, image: str, settings: RenderSettings) -> Object:
    """The Deployment of the relay of one role."""
    name = names.log_relay(graph, role)
    labels = names.common_labels(graph, _COMPONENT)
    selector = {names.SELECTOR: name}
    # Without the graph's label, by which its serving pods are counted and found.
    pod_labels = {label: value for label, value in labels.items() if label != names.GRAPH_NAME}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": labels | selector},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": selector},
            # Two relays would show each line twice.
            "strategy": {"type": "Recreate"},
            "template": {
                "metadata": {"labels": {**pod_labels, **selector, "app": f"{graph}-{role}"}},
                "spec": _pod_spec(graph, role, image, settings),
            },
        },
    }


def _pod_spec(graph: str, role: str, image: str, settings: RenderSettings) -> Object:
    container: Object = {
        "name": _COMPONENT,
        "image": image,
        **({"imagePullPolicy": settings.image_pull_policy} if settings.image_pull_policy else {}),
        "command": ["penstock"],
        "args": ["log-relay", "--graph", graph, "--role", role],
        "env": [
            {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}
            for name, path in names.POD_VARIABLES.items()
        ]
        + [{"name": "HOME", "value": names.HOME}],
        "resources": _RESOURCES,
        "securityContext": container_security(writes_anywhere=False),
        "volumeMounts": [{"name": volume, "mountPath": path} for volume, path in _WRITES.items()],
    }
    spec: Object = {
        "serviceAccountName": names.log_relay(graph),
        "enableServiceLinks": False,
        "securityContext": pod_security(),
        "terminationGracePeriodSeconds": _GRACE_PERIOD_S,
        "containers": [container],
        "volumes": [{"name": volume, "emptyDir": {}} for volume in _WRITES],
    }
    if settings.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in settings.image_pull_secrets]
    return spec
