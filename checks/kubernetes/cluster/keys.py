"""Certificates and kubeconfigs: who is who in the cluster.

One authority signs everything. Kubernetes takes a client's name from the certificate's common name and its
groups from the organisations. All of it is made anew whenever the cluster starts.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

from checks.kubernetes.cluster.command import run
from checks.kubernetes.cluster.places import (
    API,
    API_SERVICE_ADDRESS,
    CONTROL_ADDRESS,
    KUBECONFIG,
    STATE,
    node_address,
    node_name,
)

FOLDER = STATE / "keys"
CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
DAYS = "365"

API_NAMES = [
    *("DNS:kubernetes", "DNS:kubernetes.default", "DNS:kubernetes.default.svc"),
    *("DNS:kubernetes.default.svc.cluster.local", "DNS:localhost"),
    *(f"IP:{CONTROL_ADDRESS}", f"IP:{API_SERVICE_ADDRESS}", "IP:127.0.0.1"),
]


def make(nodes: int) -> None:
    FOLDER.mkdir(parents=True, mode=0o700)
    run(
        *("openssl", "req", "-x509", *CURVE, "-days", DAYS, "-subj", "/CN=penstock-test-cluster"),
        *("-keyout", FOLDER / "ca.key", "-out", FOLDER / "ca.crt"),
    )
    # Tokens of service accounts are signed with RSA.
    run("openssl", "genrsa", "-out", FOLDER / "tokens.key", "2048")
    run("openssl", "rsa", "-in", FOLDER / "tokens.key", "-pubout", "-out", FOLDER / "tokens.pub")
    certificate("apiserver", "/CN=kube-apiserver", API_NAMES)
    certificate("apiserver-to-kubelet", "/O=system:masters/CN=kube-apiserver")
    certificate("admin", "/O=system:masters/CN=admin")
    kubeconfig("admin", KUBECONFIG)
    for program in ("kube-controller-manager", "kube-scheduler", "kube-proxy"):
        certificate(program, f"/CN=system:{program}")
        kubeconfig(program)
    for number in range(1, nodes + 1):
        name = node_name(number)
        names = [f"DNS:{name}", f"IP:{node_address(number)}"]
        certificate(name, f"/O=system:nodes/CN=system:node:{name}", names)
        kubeconfig(name)


def certificate(name: str, subject: str, alternative_names: list[str] | None = None) -> None:
    """NAME.key and NAME.crt. Go demands alternative names of every server; clients may have any."""
    names = ",".join(alternative_names or [f"DNS:{name}"])
    extensions = FOLDER / f"{name}.ext"
    extensions.write_text(f"extendedKeyUsage=serverAuth,clientAuth\nsubjectAltName={names}\n")
    request = FOLDER / f"{name}.csr"
    run(
        "openssl",
        "req",
        "-new",
        *CURVE,
        "-subj",
        subject,
        "-keyout",
        FOLDER / f"{name}.key",
        "-out",
        request,
    )
    run(
        *("openssl", "x509", "-req", "-in", request, "-days", DAYS, "-extfile", extensions),
        *("-CA", FOLDER / "ca.crt", "-CAkey", FOLDER / "ca.key", "-CAcreateserial"),
        *("-out", FOLDER / f"{name}.crt"),
    )
    request.unlink()
    extensions.unlink()


def kubeconfig(name: str, path: Path | None = None) -> None:
    """How the client NAME finds and convinces the API server."""
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {
                "name": "penstock",
                "cluster": {"server": API, "certificate-authority-data": encoded("ca.crt")},
            }
        ],
        "users": [
            {
                "name": name,
                "user": {
                    "client-certificate-data": encoded(f"{name}.crt"),
                    "client-key-data": encoded(f"{name}.key"),
                },
            }
        ],
        "contexts": [{"name": "penstock", "context": {"cluster": "penstock", "user": name}}],
        "current-context": "penstock",
    }
    path = path or FOLDER / f"{name}.kubeconfig"
    path.touch(mode=0o600)
    path.write_text(json.dumps(content, indent=1))


def encoded(name: str) -> str:
    return base64.b64encode((FOLDER / name).read_bytes()).decode()
