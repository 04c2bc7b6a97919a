"""What runs in the cluster itself, in the namespace kube-system: DNS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checks.kubernetes.cluster import dns, images
from checks.kubernetes.cluster.places import DNS_ADDRESS

NAME = "kube-dns"
LABELS = {"k8s-app": NAME}
CODE = "/opt/dns"

LAME_DUCK_S = 10
"""How long a DNS pod that is to end still answers, as CoreDNS does for 5 s: until no node sends it
questions. Its process, the first of its container, takes no notice of SIGTERM."""


def dns_objects(replicas: int) -> list[dict[str, Any]]:
    metadata = {"name": NAME, "namespace": "kube-system", "labels": LABELS}
    read = {"apiGroups": [""], "resources": ["services", "endpoints"], "verbs": ["list", "watch"]}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": NAME}
    code = {Path(dns.__file__).name: Path(dns.__file__).read_text()}
    container = {
        "name": "dns",
        "image": images.BASE,
        "imagePullPolicy": "Never",
        "command": ["python3", "-u", f"{CODE}/{Path(dns.__file__).name}", "serve"],
        # What CoreDNS asks for. Without, it gets a fiftieth of another pod's share of a busy machine.
        "resources": {"requests": {"cpu": "100m", "memory": "70Mi"}},
        "securityContext": {"runAsNonRoot": True, "runAsUser": int(images.NOBODY)},
        "readinessProbe": {"httpGet": {"path": "/", "port": dns.HEALTH_PORT}, "periodSeconds": 1},
        "volumeMounts": [{"name": "code", "mountPath": CODE}],
    }
    one_on_each_node = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": LABELS},
    }
    pod = {
        "serviceAccountName": NAME,
        "topologySpreadConstraints": [one_on_each_node],
        "priorityClassName": "system-cluster-critical",
        "dnsPolicy": "Default",
        "terminationGracePeriodSeconds": LAME_DUCK_S,
        "containers": [container],
        "volumes": [{"name": "code", "configMap": {"name": NAME}}],
    }
    ports = [
        {"name": "dns", "port": 53, "targetPort": dns.PORT, "protocol": "UDP"},
        {"name": "dns-tcp", "port": 53, "targetPort": dns.PORT, "protocol": "TCP"},
    ]
    rbac = "rbac.authorization.k8s.io/v1"
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata},
        {"apiVersion": rbac, "kind": "ClusterRole", "metadata": metadata, "rules": [read]},
        {
            "apiVersion": rbac,
            "kind": "ClusterRoleBinding",
            "metadata": metadata,
            "roleRef": role,
            "subjects": [{"kind": "ServiceAccount", "name": NAME, "namespace": "kube-system"}],
        },
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": code},
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {"selector": LABELS, "clusterIP": DNS_ADDRESS, "ports": ports},
        },
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": metadata,
            "spec": {
                "replicas": replicas,
                "selector": {"matchLabels": LABELS},
                "template": {"metadata": {"labels": LABELS}, "spec": pod},
            },
        },
    ]
