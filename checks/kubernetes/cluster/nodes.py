"""A node: a box with containerd, kubelet and kube-proxy, in which pods run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from checks.kubernetes.cluster import binaries, boxes, cgroups, images
from checks.kubernetes.cluster.boxes import Service, shared
from checks.kubernetes.cluster.command import ClusterError, wait_until
from checks.kubernetes.cluster.control import READY, key
from checks.kubernetes.cluster.places import DNS_ADDRESS, PODS, STATE, node_address, node_name, node_pods

SOCKET = "/run/containerd/containerd.sock"
PAUSE = f"{images.REGISTRY}/pause:3.2"
CONTAINERD_S = 30.0
CGROUP_DRIVER = "cgroupfs"


def start(number: int) -> None:
    configure(number)
    boxes.start(node_name(number), node_address(number), services(number))


def services(number: int) -> list[Service]:
    name = node_name(number)
    with_tools = ["env", f"PATH={search_path()}"]
    containerd = ["containerd", "--config", configuration(name, "containerd.toml")]
    kubelet = [
        str(binaries.kubernetes("kubelet")),
        f"--config={configuration(name, 'kubelet.json')}",
        f"--kubeconfig={key(f'{name}.kubeconfig')}",
        f"--hostname-override={name}",
        f"--node-ip={node_address(number)}",
        "--container-runtime=remote",
        f"--container-runtime-endpoint=unix://{SOCKET}",
        f"--pod-infra-container-image={PAUSE}",
        "--v=1",
    ]
    proxy = [str(binaries.kubernetes("kube-proxy")), f"--config={configuration(name, 'kube-proxy.json')}"]
    return [
        Service("containerd", [*with_tools, *containerd]),
        Service("kubelet", [*with_tools, *kubelet], after=[SOCKET, READY]),
        Service("kube-proxy", [*with_tools, *proxy], after=[READY]),
    ]


def search_path() -> str:
    """PATH in a node: containerd finds runc there, and people kubectl and ctr."""
    own = (binaries.tool("bin"), binaries.tool("sbin"), binaries.folder() / "bin")
    return ":".join(map(str, own)) + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def configuration(box: str, file: str) -> str:
    return shared("configuration", box, file)


def configure(number: int) -> None:
    name = node_name(number)
    folder = STATE / "configuration" / name
    (folder / "cni").mkdir(parents=True, exist_ok=True)
    (folder / "containerd.toml").write_text(containerd_configuration(name))
    (folder / "cni" / "pods.conflist").write_text(json.dumps(network(number), indent=1))
    (folder / "kubelet.json").write_text(json.dumps(kubelet_configuration(name), indent=1))
    (folder / "kube-proxy.json").write_text(json.dumps(proxy_configuration(name), indent=1))
    (folder / "resolv.conf").touch()


def containerd_configuration(name: str) -> str:
    unused = json.dumps(
        [f"io.containerd.snapshotter.v1.{kind}" for kind in ("aufs", "btrfs", "devmapper", "zfs")]
    )
    return f"""\
version = 2
disabled_plugins = {unused}

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  # Pods' networks end with the box instead of staying mounted on the machine.
  netns_mounts_under_state_dir = true
  # Where root may not lower a process's OOM score, runc would fail to start any sandbox.
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{binaries.tool("lib/cni")}"
    conf_dir = "{configuration(name, "cni")}"
"""


def network(number: int) -> dict[str, Any]:
    """Pods get addresses of the node's own range, and are joined by a bridge in its box."""
    addresses = {
        "type": "host-local",
        "dataDir": "/run/pod-addresses",  # forgotten when the box ends, as its pods are
        "ranges": [[{"subnet": node_pods(number)}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    bridge = {"type": "bridge", "bridge": "pods", "isGateway": True, "hairpinMode": True, "ipam": addresses}
    ports = {"type": "portmap", "capabilities": {"portMappings": True}}
    return {"cniVersion": "0.4.0", "name": "pods", "plugins": [bridge, ports]}


def kubelet_configuration(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": key("ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": key(f"{name}.crt"),
        "tlsPrivateKeyFile": key(f"{name}.key"),
        "cgroupDriver": CGROUP_DRIVER,
        "cgroupRoot": f"/{cgroups.path_of(name)}",
        "clusterDNS": [DNS_ADDRESS],
        "clusterDomain": "cluster.local",
        "resolvConf": configuration(name, "resolv.conf"),  # empty: no name outside the cluster is known
        "failSwapOn": False,
        # The default, every 10 s, makes a new node Ready up to 8 s later.
        "nodeStatusUpdateFrequency": "2s",
        "nodeStatusReportFrequency": "5m",
        # By default pods are evicted when a tenth of the disk is free: a developer's disk may be fuller.
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        # Images that were collected could not be pulled again.
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "volumePluginDir": "/var/lib/kubelet/volume-plugins",
    }


def proxy_configuration(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": key("kube-proxy.kubeconfig")},
        "clusterCIDR": PODS,
        "hostnameOverride": name,
        "mode": "iptables",
        # These limits are read-only in a network namespace, and it ends when it cannot set them.
        "conntrack": {
            "maxPerCore": 0,
            "min": 0,
            "tcpEstablishedTimeout": "0s",
            "tcpCloseWaitTimeout": "0s",
        },
    }


def containerd(number: int, *command: str, check: bool = True) -> str:
    """containerd's own command line, on Kubernetes' containers and images of this node."""
    ctr = str(binaries.tool("bin/ctr"))
    return boxes.inside(node_name(number), ctr, "-n", "k8s.io", *command, check=check).stdout


def load(number: int, archive: Path) -> None:
    """Give a node the images, once its containerd answers. What it has already is not stored again."""
    name = node_name(number)

    def answers() -> bool:
        ctr = str(binaries.tool("bin/ctr"))
        return boxes.inside(name, ctr, "version", check=False).returncode == 0

    wait_until(answers, f"containerd answers in {name}", CONTAINERD_S)
    containerd(number, "images", "import", str(archive))


def number_of(box: str) -> int:
    """The N of "nodeN" or "N"."""
    text = box.removeprefix("node")
    if not text.isdecimal():
        raise ClusterError(f"{box!r} is no node: say 1 or node1")
    return int(text)
