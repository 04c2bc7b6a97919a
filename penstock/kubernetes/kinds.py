"""The kinds of objects that Penstock reads or writes."""

from __future__ import annotations

from penstock.kubernetes.api import Kind

GRAPHS = Kind("nvidia.com", "v1alpha1", "DynamoGraphDeployment", "dynamographdeployments")
ADAPTERS = Kind(
    "nvidia.com",
    "v1alpha1",
    "DynamoGraphDeploymentScalingAdapter",
    "dynamographdeploymentscalingadapters",
)

PODS = Kind("", "v1", "Pod", "pods")
SERVICES = Kind("", "v1", "Service", "services")
SECRETS = Kind("", "v1", "Secret", "secrets")
CONFIG_MAPS = Kind("", "v1", "ConfigMap", "configmaps")
SERVICE_ACCOUNTS = Kind("", "v1", "ServiceAccount", "serviceaccounts")
VOLUME_CLAIMS = Kind("", "v1", "PersistentVolumeClaim", "persistentvolumeclaims")
EVENTS = Kind("", "v1", "Event", "events")
DEPLOYMENTS = Kind("apps", "v1", "Deployment", "deployments")
ROLES = Kind("rbac.authorization.k8s.io", "v1", "Role", "roles")
ROLE_BINDINGS = Kind("rbac.authorization.k8s.io", "v1", "RoleBinding", "rolebindings")
INGRESSES = Kind("networking.k8s.io", "v1", "Ingress", "ingresses")
DISRUPTION_BUDGETS = Kind("policy", "v1", "PodDisruptionBudget", "poddisruptionbudgets")
DISRUPTION_BUDGETS_BETA = Kind("policy", "v1beta1", "PodDisruptionBudget", "poddisruptionbudgets")
LEADER_WORKER_SETS = Kind("leaderworkerset.x-k8s.io", "v1", "LeaderWorkerSet", "leaderworkersets")
LEASES = Kind("coordination.k8s.io", "v1", "Lease", "leases")
DEFINITIONS = Kind(
    "apiextensions.k8s.io",
    "v1",
    "CustomResourceDefinition",
    "customresourcedefinitions",
    namespaced=False,
)
