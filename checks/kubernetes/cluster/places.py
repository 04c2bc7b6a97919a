"""Names, addresses and folders of the cluster.

All of them are fixed, so one machine holds one cluster. Nothing of it is in the checkout: what takes long
to build is in the user's cache folder, what belongs to the running cluster is in `STATE` and, for as long
as the machine is up, in `RUNTIME`.
"""

from __future__ import annotations

import os
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[3]

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "penstock"
STATE = CACHE / "cluster-state"  # certificates, logs and disks of the running cluster
KUBECONFIG = STATE / "admin.kubeconfig"
RUNTIME = Path("/run/penstock-cluster")  # whose cluster runs on this machine

NAME = "penstock-cluster"  # of its control groups
CONTROL = "control"  # the box of the control plane; the others are node1, node2, ...

# The network between the boxes. The control plane's box is its switch, and the machine is plugged into it.
UPLINK = "penstock0"  # the machine's end of its cable
MACHINE_ADDRESS = "10.200.0.254"
CONTROL_ADDRESS = "10.200.0.1"
API_PORT = 6443
API = f"https://{CONTROL_ADDRESS}:{API_PORT}"

PODS = "10.244.0.0/16"
SERVICES = "10.96.0.0/16"
API_SERVICE_ADDRESS = "10.96.0.1"
DNS_ADDRESS = "10.96.0.10"
MAX_NODES = 9


def node_name(number: int) -> str:
    return f"node{number}"


def node_address(number: int) -> str:
    return f"10.200.0.{10 + number}"


def node_pods(number: int) -> str:
    """The addresses of a node's pods."""
    return f"10.244.{number}.0/24"
