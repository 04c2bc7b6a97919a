"""Renders the Service of a frontend, and its Ingress if the manifest asks for one."""

from __future__ import annotations

from penstock.graph.manifest import IngressSpec
from penstock.kubernetes.api import Object
from penstock.kubernetes.kinds import INGRESSES, SERVICES
from penstock.operator import names
from penstock.operator.rendering.service_plan import ServicePlan
from penstock.operator.rendering.workloads import metadata

_DEFAULT_SUFFIX = "local"  # of hosts, as the manifest API has it


def service(plan: ServicePlan) -> Object:
    """The Service: one address for all replicas of a frontend."""
    port = {
        "name": names.HTTP_PORT_NAME,
        "port": names.HTTP_PORT,
        "targetPort": names.HTTP_PORT_NAME,
        "protocol": "TCP",
    }
    return {
        "apiVersion": SERVICES.api_version,
        "kind": SERVICES.name,
        "metadata": metadata(plan),
        "spec": {"selector": plan.selector(), "ports": [port]},
    }


def ingress(plan: ServicePlan, spec: IngressSpec) -> Object:
    """The Ingress: routes requests from outside the cluster to the Service of the same name."""
    host = ingress_host(spec)
    backend = {"service": {"name": plan.object_name, "port": {"name": names.HTTP_PORT_NAME}}}
    rule = {"host": host, "http": {"paths": [{"path": "/", "pathType": "Prefix", "backend": backend}]}}
    rendered: Object = {"rules": [rule]}
    if spec.ingress_controller_class_name:
        rendered["ingressClassName"] = spec.ingress_controller_class_name
    if spec.tls is not None and spec.tls.secret_name:
        rendered["tls"] = [{"hosts": [host], "secretName": spec.tls.secret_name}]
    about = metadata(plan)
    about["labels"] = spec.labels | about["labels"]
    if annotations := about.get("annotations", {}) | spec.annotations:
        about["annotations"] = annotations
    return {
        "apiVersion": INGRESSES.api_version,
        "kind": INGRESSES.name,
        "metadata": about,
        "spec": rendered,
    }


def ingress_host(spec: IngressSpec) -> str:
    """The host, as the manifest API composes it: prefix and host, a dot, and the suffix unless it is
    empty."""
    suffix = _DEFAULT_SUFFIX if spec.host_suffix is None else spec.host_suffix
    host = f"{spec.host_prefix or ''}{spec.host or ''}"
    return f"{host}.{suffix}" if suffix else host
