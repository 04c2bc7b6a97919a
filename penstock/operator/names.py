"""What objects, labels, ports and annotations are called. One place, for the operator and its tests."""

from __future__ import annotations

MANAGER = "penstock-operator"

MAIN = "main"
"""The container that serves, as the manifest API calls it."""

LINK_PORT, LINK_PORT_NAME = 7000, "link"
KV_PORT, KV_PORT_NAME = 7100, "kv"
SYSTEM_PORT, SYSTEM_PORT_NAME = 9090, "system"
HTTP_PORT, HTTP_PORT_NAME = 8000, "http"

POD_VARIABLES = {
    "POD_NAME": "metadata.name",
    "POD_NAMESPACE": "metadata.namespace",
    "POD_IP": "status.podIP",
}
"""Variables of every pod that serves, and the field of the pod that each shows."""

USER_ID = 10001
"""The user of Penstock's images."""

USER = "penstock"
HOME = "/home/penstock"
LINK_FOLDER = "/etc/penstock/link"
LINK_VOLUME, HOME_VOLUME, TEMPORARY_VOLUME = "penstock-link", "penstock-home", "penstock-tmp"
"""Names of volumes that users will hardly give to their own."""

LINK_SERVER_NAME = "worker.penstock.internal"
"""The host name in the workers' certificates. Their addresses change, so certificates do not contain
them."""

SELECTOR = "nvidia.com/selector"
DISCOVERED_BY = "penstock.dev/graph"
"""Label of pods that serve, and of no other pods: frontends find workers by it."""

GRAPH_NAME = "nvidia.com/dynamo-graph-deployment-name"

ENGINE = "penstock.dev/engine"
MODEL = "penstock.dev/model"
IMAGE = "penstock.dev/image"
LOG_RELAYS = "penstock.dev/log-relays"
TOPOLOGY_KEY = "penstock.dev/topology-key"
DISCOVERY = "penstock.dev/discovery"
STRATEGY = "nvidia.com/deployment-strategy"
MAX_SURGE = "nvidia.com/deployment-rolling-update-max-surge"
MAX_UNAVAILABLE = "nvidia.com/deployment-rolling-update-max-unavailable"
ENABLE_METRICS = "nvidia.com/enable-metrics"
RESTARTED = "nvidia.com/restartAt"
OPERATORS_PREFIXES = ("penstock.dev/", "nvidia.com/")
"""Prefixes of annotations for the operator. Pods do not get them: a change of one would restart the
pods."""


def object_name(graph: str, service: str) -> str:
    """The name of a service's Deployment and Service."""
    return f"{graph}-{service.lower()}"


def frontend_account(graph: str) -> str:
    """The ServiceAccount of a graph's frontends."""
    return f"{graph}-frontend"


def log_relay(graph: str, role: str = "") -> str:
    """The ServiceAccount of a graph's log relays, or the Deployment of one role's."""
    return f"{graph}-log-relay-{role}" if role else f"{graph}-log-relay"


def link_secret(graph: str, side: str) -> str:
    """The Secret with what one side of the links needs; `side` is ca, worker or frontend."""
    return f"{graph}-link-{side}"


def common_labels(graph: str, component: str) -> dict[str, str]:
    """Labels of every object of a graph; `component` is a role."""
    return {
        "app.kubernetes.io/name": "penstock",
        "app.kubernetes.io/instance": graph,
        "app.kubernetes.io/component": component,
        "app.kubernetes.io/part-of": graph,
        "app.kubernetes.io/managed-by": MANAGER,
        GRAPH_NAME: graph,
    }
