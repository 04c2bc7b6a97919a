"""Pods that tests start, in Penstock's own image: it has Python and curl, and no other image is needed."""

from __future__ import annotations

from typing import Any

PORT = 8080
SERVE = ["python3", "-u", "-m", "http.server", str(PORT), "--directory", "/tmp"]
WAIT = ["sleep", "infinity"]


def pod(image: str, command: list[str], node: str | None = None, **container: Any) -> dict[str, Any]:
    """The spec of a pod with one container, on this node if one is named. One that serves is Ready once it
    does."""
    main = {
        "name": "main",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": command,
        **container,
    }
    if command == SERVE:
        main["readinessProbe"] = {
            "httpGet": {"path": "/", "port": PORT},
            "periodSeconds": 1,
            "timeoutSeconds": 10,
        }
    spec: dict[str, Any] = {"containers": [main], "terminationGracePeriodSeconds": 1}
    if node is not None:
        spec["nodeSelector"] = {"kubernetes.io/hostname": node}
    return spec


def named_pod(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    """With the label app=NAME."""
    metadata = {"name": name, "labels": {"app": name}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def deployment(name: str, spec: dict[str, Any], replicas: int = 1) -> dict[str, Any]:
    labels = {"app": name}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {**spec, "restartPolicy": "Always"}},
        },
    }


def service(name: str, port: int = PORT, **spec: Any) -> dict[str, Any]:
    """For the pods with the label app=NAME."""
    ports = [{"name": "http", "port": port}]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {"selector": {"app": name}, "ports": ports, **spec},
    }
