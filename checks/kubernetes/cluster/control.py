"""The control plane: etcd, kube-apiserver, kube-controller-manager and kube-scheduler, in their own box."""

from __future__ import annotations

from checks.kubernetes.cluster import binaries, boxes
from checks.kubernetes.cluster.boxes import Service, shared
from checks.kubernetes.cluster.places import API, API_PORT, CONTROL, CONTROL_ADDRESS, SERVICES

ETCD = "http://127.0.0.1:2379"
READY = f"{API}/readyz"


def start() -> None:
    boxes.start(CONTROL, CONTROL_ADDRESS, services())


def services() -> list[Service]:
    return [
        Service("etcd", etcd()),
        Service("kube-apiserver", apiserver(), after=[f"{ETCD}/health"]),
        Service("kube-controller-manager", controller_manager(), after=[READY]),
        Service("kube-scheduler", scheduler(), after=[READY]),
    ]


def key(name: str) -> str:
    return shared("keys", name)


def etcd() -> list[str]:
    return [
        str(binaries.tool("bin/etcd")),
        f"--data-dir={shared('disks', CONTROL, 'etcd')}",
        f"--listen-client-urls={ETCD}",
        f"--advertise-client-urls={ETCD}",
        "--listen-peer-urls=http://127.0.0.1:2380",
        "--unsafe-no-fsync",  # nothing in a test cluster has to survive a power cut
        "--auto-compaction-mode=revision",
        "--auto-compaction-retention=1000",
        "--logger=zap",
        "--log-outputs=stderr",
    ]


def apiserver() -> list[str]:
    return [
        str(binaries.kubernetes("kube-apiserver")),
        f"--etcd-servers={ETCD}",
        f"--bind-address={CONTROL_ADDRESS}",
        f"--advertise-address={CONTROL_ADDRESS}",
        f"--secure-port={API_PORT}",
        f"--tls-cert-file={key('apiserver.crt')}",
        f"--tls-private-key-file={key('apiserver.key')}",
        f"--client-ca-file={key('ca.crt')}",
        f"--kubelet-client-certificate={key('apiserver-to-kubelet.crt')}",
        f"--kubelet-client-key={key('apiserver-to-kubelet.key')}",
        "--kubelet-preferred-address-types=InternalIP",
        f"--service-cluster-ip-range={SERVICES}",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={key('tokens.pub')}",
        f"--service-account-signing-key-file={key('tokens.key')}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        # This box reaches pods, but not services' addresses: it has no kube-proxy.
        "--enable-aggregator-routing=true",
        f"--requestheader-client-ca-file={key('ca.crt')}",
        "--requestheader-allowed-names=kube-apiserver",
        "--requestheader-username-headers=X-Remote-User",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        f"--proxy-client-cert-file={key('apiserver-to-kubelet.crt')}",
        f"--proxy-client-key-file={key('apiserver-to-kubelet.key')}",
        "--allow-privileged=true",
        "--v=1",
    ]


def controller_manager() -> list[str]:
    return [
        str(binaries.kubernetes("kube-controller-manager")),
        f"--kubeconfig={key('kube-controller-manager.kubeconfig')}",
        "--leader-elect=false",  # there is only one
        "--port=0",
        "--bind-address=127.0.0.1",
        "--cert-dir=/run/kube-controller-manager",
        "--use-service-account-credentials=true",
        f"--root-ca-file={key('ca.crt')}",
        f"--service-account-private-key-file={key('tokens.key')}",
        f"--cluster-signing-cert-file={key('ca.crt')}",
        f"--cluster-signing-key-file={key('ca.key')}",
        "--v=1",
    ]


def scheduler() -> list[str]:
    return [
        str(binaries.kubernetes("kube-scheduler")),
        f"--kubeconfig={key('kube-scheduler.kubeconfig')}",
        "--leader-elect=false",
        "--port=0",
        "--bind-address=127.0.0.1",
        "--cert-dir=/run/kube-scheduler",
        "--v=1",
    ]
