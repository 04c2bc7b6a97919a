"""A DynamoGraphDeployment as what Penstock runs: services with a role, replicas, flags and environment.

`manifest` checks the YAML into structs, `command` reads what a container runs, `model` joins the two into a
`Graph`.
"""

from penstock.graph.container_command import ServiceKind
from penstock.graph.manifest import Manifest, checked_manifest, parse_manifest
from penstock.graph.services import ClusterRules, Graph, Overrides, Service, build_graph, load_graph

__all__ = [
    "ClusterRules",
    "Graph",
    "Manifest",
    "Overrides",
    "Service",
    "ServiceKind",
    "build_graph",
    "checked_manifest",
    "load_graph",
    "parse_manifest",
]
