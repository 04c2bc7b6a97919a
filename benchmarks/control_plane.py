"""A Kubernetes control plane without nodes, on loopback: for benchmarks of the operator.

etcd, API server and controller manager are those that `make cluster` builds; they need no root. What writes
to the API server is told from its audit log, so that the operator's writes are counted apart from all
others.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from checks.kubernetes.cluster import binaries

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
USERS = {"admin": "admin-token", "operator": "operator-token"}
_WRITES = ("create", "update", "patch", "delete", "deletecollection")


class ControlPlane:
    """One that runs. `folder` holds all it writes."""

    def __init__(self, folder: Path, api_port: int) -> None:
        self.folder = folder
        self.api_port = api_port
        self.started: list[subprocess.Popen[bytes]] = []

    def kubeconfig(self, user: str) -> str:
        """The path of a user's."""
        return str(self.folder / f"{user}.kubeconfig")

    def writes(self, since: int = 0) -> Counter[str]:
        """What the operator wrote since then, its lease left out: "create events" and so on."""
        counts: Counter[str] = Counter()
        with (self.folder / "audit.log").open("rb") as log:
            log.seek(since)
            for line in log:
                if not line.endswith(b"\n"):
                    break
                entry = json.loads(line)
                if entry["objectRef"]["resource"] != "leases":
                    counts[f"{entry['verb']} {entry['objectRef']['resource']}"] += 1
        return counts

    def now(self) -> int:
        """A place in the audit log, for `writes`."""
        return (self.folder / "audit.log").stat().st_size


@contextlib.contextmanager
def control_plane(folder: Path) -> Iterator[ControlPlane]:
    """A new one, ended afterwards. Exits with a line where Kubernetes has not been built."""
    needed = [binaries.tool("bin/etcd")]
    needed += [binaries.kubernetes(name) for name in ("kube-apiserver", "kube-controller-manager")]
    if missing := [path for path in needed if not path.exists()]:
        sys.exit(f"{missing[0]} is not there: `make cluster` builds it")
    etcd_port, peer_port, api_port = free_ports(3)
    plane = ControlPlane(folder, api_port)
    _write_files(plane)
    etcd = f"http://127.0.0.1:{etcd_port}"
    try:
        _start(plane, _etcd(folder, etcd, peer_port))
        _wait(plane, f"{etcd}/health")
        _start(plane, _api_server(plane, etcd))
        _wait(plane, f"https://127.0.0.1:{api_port}/readyz")
        _start(plane, _controller_manager(plane))
        yield plane
    finally:
        for process in reversed(plane.started):
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_ports(count: int) -> list[int]:
    """Of loopback."""
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]


def _write_files(plane: ControlPlane) -> None:
    folder = plane.folder
    subprocess.run(
        ["openssl", "genrsa", "-out", folder / "accounts.key", "2048"], check=True, capture_output=True
    )
    (folder / "tokens.csv").write_text(
        "".join(f'{token},{user},{user},"system:masters"\n' for user, token in USERS.items())
    )
    rules = [{"level": "Metadata", "users": ["operator"], "verbs": _WRITES}, {"level": "None"}]
    policy = {
        "apiVersion": "audit.k8s.io/v1",
        "kind": "Policy",
        "omitStages": ["RequestReceived"],
        "rules": rules,
    }
    (folder / "audit.json").write_text(json.dumps(policy))
    for user, token in USERS.items():
        cluster = {"server": f"https://127.0.0.1:{plane.api_port}", "insecure-skip-tls-verify": True}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "bench", "cluster": cluster}],
            "users": [{"name": user, "user": {"token": token}}],
            "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": user}}],
            "current-context": "bench",
        }
        (folder / f"{user}.kubeconfig").write_text(json.dumps(content))


def _etcd(folder: Path, url: str, peer_port: int) -> list[str]:
    return [
        str(binaries.tool("bin/etcd")),
        f"--data-dir={folder}/etcd",
        f"--listen-client-urls={url}",
        f"--advertise-client-urls={url}",
        f"--listen-peer-urls=http://127.0.0.1:{peer_port}",
        "--unsafe-no-fsync",
        "--auto-compaction-mode=revision",
        "--auto-compaction-retention=1000",
        "--logger=zap",
    ]


def _api_server(plane: ControlPlane, etcd: str) -> list[str]:
    folder = plane.folder
    return [
        str(binaries.kubernetes("kube-apiserver")),
        f"--etcd-servers={etcd}",
        "--bind-address=127.0.0.1",
        "--advertise-address=127.0.0.1",
        f"--secure-port={plane.api_port}",
        f"--cert-dir={folder}/serving",
        f"--token-auth-file={folder}/tokens.csv",
        "--authorization-mode=RBAC",
        "--service-cluster-ip-range=10.96.0.0/16",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={folder}/accounts.key",
        f"--service-account-signing-key-file={folder}/accounts.key",
        "--endpoint-reconciler-type=none",
        f"--audit-policy-file={folder}/audit.json",
        f"--audit-log-path={folder}/audit.log",
    ]


def _controller_manager(plane: ControlPlane) -> list[str]:
    return [
        str(binaries.kubernetes("kube-controller-manager")),
        f"--kubeconfig={plane.kubeconfig('admin')}",
        "--leader-elect=false",
        "--port=0",
        "--secure-port=0",
        f"--service-account-private-key-file={plane.folder}/accounts.key",
    ]


def _start(plane: ControlPlane, command: list[str]) -> None:
    with (plane.folder / f"{Path(command[0]).name}.log").open("ab") as log:
        plane.started.append(subprocess.Popen(command, stdout=log, stderr=log, cwd=plane.folder))


def _wait(plane: ControlPlane, url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    context = None
    if url.startswith("https"):
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    while True:
        try:
            with urllib.request.urlopen(url, timeout=2, context=context):
                return
        except OSError as error:
            if time.monotonic() > deadline or plane.started[-1].poll() is not None:
                log = plane.folder / f"{Path(plane.started[-1].args[0]).name}.log"  # type: ignore[index]
                end = log.read_text(errors="replace").splitlines()[-5:]
                raise SystemExit("\n".join([f"{url}: {error}", *end])) from error
        time.sleep(0.1)
