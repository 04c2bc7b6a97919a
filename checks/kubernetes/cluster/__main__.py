"""A real Kubernetes cluster on this machine: `python -m checks.kubernetes.cluster --help`."""

from __future__ import annotations

import argparse
import signal
import sys

from checks.kubernetes.cluster import binaries, boxes, cgroups, images, lifecycle, nodes
from checks.kubernetes.cluster.command import ClusterError
from checks.kubernetes.cluster.places import CONTROL, KUBECONFIG, node_name

FOR_CONTROL = ("freeze", "thaw", "kill-process")  # the control plane's box is the network's switch, too


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m checks.kubernetes.cluster",
        description="A real Kubernetes cluster on this machine (Debian 12, as root), for tests.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    up = commands.add_parser("up", help="build what is missing, and start the cluster")
    up.add_argument("--nodes", type=int, default=2, help="how many nodes (default: 2)")
    commands.add_parser("down", help="end it, and leave nothing behind but the build")
    commands.add_parser("build", help="only build: 6 minutes on 2 cores, once")
    commands.add_parser("status", help="whose cluster runs, and what in it")
    node = commands.add_parser("node", help="what can happen to a node").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    for action, text in (
        ("freeze", "all that runs on it stands still, pods too"),
        ("thaw", "and goes on"),
        ("cut", "pull its network cable"),
        ("join", "and put it back"),
        ("stop", "pull its power cord"),
        ("start", "and switch it on again, with the disk that it had"),
        ("kill-process", "kill one of its services; it is started again after 1 s"),
    ):
        added = node.add_parser(action, help=text)
        of_control = " or `control`" if action in FOR_CONTROL else ""
        added.add_argument("node", help=f"1, 2, ...{of_control}")
        if action == "kill-process":
            added.add_argument("name", help="kubelet, containerd, kube-proxy, etcd, kube-apiserver, ...")
            added.add_argument(
                "--signal",
                choices=[known.name.removeprefix("SIG") for known in signal.Signals],
                default="KILL",
                help="another signal: STOP and CONT halt it for a while",
            )
    gpus = commands.add_parser("gpus", help="let a node claim GPUs that it does not have")
    gpus.add_argument("node")
    gpus.add_argument("count", type=int)
    shell = commands.add_parser("sh", help="a shell, or a command, in a node")
    shell.add_argument("node")
    shell.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND")
    return top


def box_of(text: str) -> str:
    return text if text == CONTROL else node_name(nodes.number_of(text))


def act(arguments: argparse.Namespace) -> None:
    box = box_of(arguments.node)
    if box == CONTROL and arguments.action not in FOR_CONTROL:
        raise ClusterError(
            f"the control plane takes {', '.join(FOR_CONTROL)}: it is the nodes' network, too"
        )
    if arguments.action != "start":
        boxes.running(box)
    match arguments.action:
        case "freeze":
            cgroups.freeze(box)
        case "thaw":
            cgroups.thaw(box)
        case "cut":
            boxes.cut(box)
        case "join":
            boxes.join(box)
        case "stop":
            boxes.stop(box)
        case "start":
            lifecycle.start_node(box)
        case "kill-process":
            boxes.signal_process(box, arguments.name, signal.Signals[f"SIG{arguments.signal}"])


def main() -> int:
    arguments = parser().parse_args()
    if arguments.command not in ("build", "status"):
        lifecycle.check_machine()
    match arguments.command:
        case "up":
            lifecycle.up(arguments.nodes)
        case "down":
            lifecycle.down()
        case "build":
            lifecycle.check_machine()
            binaries.build()
            images.build()
        case "status":
            print("\n".join(lifecycle.status()))
        case "node":
            act(arguments)
        case "gpus":
            lifecycle.gpus(box_of(arguments.node), arguments.count)
        case "sh":
            environment = {"KUBECONFIG": str(KUBECONFIG), "PATH": nodes.search_path()}
            return boxes.shell(box_of(arguments.node), arguments.words, environment)
    return 0


signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and end what it runs
try:
    sys.exit(main())
except ClusterError as error:
    sys.exit(f"error: {error}")
except KeyboardInterrupt:
    sys.exit(130)
