"""Boxes: what stands for one computer of the cluster.

A box is a set of Linux namespaces, a control group, a folder as its disk, and a network cable. The box of
the control plane is also the switch that the cables lead to: its eth0 is a bridge, and has a port named
after each node. The machine is plugged into it, too, which is how kubectl reaches the API server and tests
reach pods.

Nothing of a box is outside its namespaces but its control group, its disk and the other end of its cable.
Once its first process is killed, the kernel ends all other processes in it, its mounts and its network.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from checks.kubernetes.cluster import cgroups, init
from checks.kubernetes.cluster.command import Argument, ClusterError, output, run, wait_until
from checks.kubernetes.cluster.places import (
    CONTROL,
    CONTROL_ADDRESS,
    MACHINE_ADDRESS,
    MAX_NODES,
    PODS,
    STATE,
    UPLINK,
    node_address,
    node_name,
    node_pods,
)

NAMESPACES = ("--mount", "--uts", "--ipc", "--pid", "--net")
START_S = 30.0


@dataclass(frozen=True)
class Service:
    """A program that runs for as long as its box. `after`: what must answer first, see init.py."""

    name: str
    command: Sequence[str]
    after: Sequence[str] = ()


def shared(*parts: str) -> str:
    """Where a box sees what lies below STATE."""
    return str(init.SHARED.joinpath(*parts))


def disk(box: str) -> Path:
    return STATE / "disks" / box


def log_folder(box: str) -> Path:
    return STATE / "logs" / box


def start(box: str, address: str, services: Sequence[Service]) -> None:
    """Switch a box on. Its services start by themselves, in the order that their `after` demands."""
    disk(box).mkdir(parents=True, exist_ok=True)
    log_folder(box).mkdir(parents=True, exist_ok=True)
    for folder in init.ON_DISK:
        (disk(box) / folder[1:]).mkdir(parents=True, exist_ok=True)
    specification = log_folder(box) / "box.json"
    specification.write_text(
        json.dumps(
            {
                "name": box,
                "address": f"{address}/24",
                "routes": routes(box),
                "disk": str(disk(box)),
                "shared": str(STATE),
                "services": [
                    {**asdict(service), "log": shared("logs", box, f"{service.name}.log")}
                    for service in services
                ],
            },
            indent=1,
        )
    )
    join = "".join(f"echo 0 > {file}; " for file in cgroups.create(box))
    log = log_folder(box) / "init.log"
    # Forked off, so that it is nobody's child here, and outlives whoever starts it.
    run(
        *("setsid", "--fork", "sh", "-ec", f'exec < /dev/null >> "{log}" 2>&1; {join}exec "$@"', "sh"),
        *("unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc"),
        *(sys.executable, "-I", init.__file__, specification),
        cwd=Path("/"),
    )
    wait_until(lambda: first_process(box) is not None, f"{box} starts", START_S, every_s=0.02)
    plug_in(box)


def routes(box: str) -> list[tuple[str, str]]:
    others = [number for number in range(1, MAX_NODES + 1) if node_name(number) != box]
    to_pods = [(node_pods(number), node_address(number)) for number in others]
    return to_pods if box == CONTROL else [*to_pods, ("default", CONTROL_ADDRESS)]


def first_process(box: str) -> int | None:
    """Process 1 of the box, as the machine numbers it; None while the box is off."""
    for pid in cgroups.own_processes(box):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        [numbers] = [line.split()[1:] for line in status.splitlines() if line.startswith("NSpid:")]
        if len(numbers) > 1 and numbers[-1] == "1":
            return pid
    return None


def running(box: str) -> int:
    """As first_process, for a box that must be on."""
    pid = first_process(box)
    if pid is None:
        raise ClusterError(f"{box} is not running: `status` shows what is")
    return pid


def plug_in(box: str) -> None:
    pid = str(running(box))
    switch = running(CONTROL)
    if box == CONTROL:
        inside(CONTROL, "ip", "link", "add", "eth0", "type", "bridge")
        run("ip", "link", "add", UPLINK, "type", "veth", "peer", "name", "machine", "netns", pid)
        run("ip", "address", "add", f"{MACHINE_ADDRESS}/24", "dev", UPLINK)
        run("ip", "link", "set", UPLINK, "up")
        run("ip", "route", "add", PODS, "via", CONTROL_ADDRESS, "dev", UPLINK)
        inside(CONTROL, "ip", "link", "set", "machine", "master", "eth0", "up")
    else:
        network_of_switch = ("nsenter", "--net", "--target", str(switch))
        run(*network_of_switch, "ip", "link", "add", box, "type", "veth", "peer", "name", "cable")
        run(
            *network_of_switch, "ip", "link", "set", "cable", "netns", f"/proc/{pid}/ns/net", "name", "eth0"
        )
        run(*network_of_switch, "ip", "link", "set", box, "master", "eth0", "up")


def stop(box: str) -> None:
    """Pull its power cord. The disk stays."""
    cgroups.end(box)
    # By itself, a cable goes with the last connection through it, which may wait for the other side to end.
    if box == CONTROL:
        run("ip", "link", "delete", UPLINK, check=False)
    elif first_process(CONTROL) is not None:
        inside(CONTROL, "ip", "link", "delete", box, check=False)


def cut(box: str) -> None:
    """Pull its network cable."""
    inside(CONTROL, "ip", "link", "set", box, "down")


def join(box: str) -> None:
    """Put its network cable back."""
    inside(CONTROL, "ip", "link", "set", box, "up")


def enter(box: str) -> list[str]:
    """The beginning of a command line that runs the rest of it in a box."""
    return ["nsenter", "--target", str(running(box)), *NAMESPACES, "--"]


def inside(
    box: str, *command: Argument, check: bool = True, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program in a box."""
    return run(*enter(box), *command, check=check, stdin=stdin)


def shell(box: str, command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command or a shell in a box, on this terminal; its exit status."""
    argv = [*enter(box), *(command or ["bash"])]
    return subprocess.run(argv, check=False, env={**os.environ, **environment}).returncode


def signal_process(box: str, name: str, number: signal.Signals) -> None:
    """Send a signal to a process of the box (not of a pod), by the name of its program."""
    found = [pid for pid in cgroups.own_processes(box) if program(pid) == name[:15]]
    if not found:
        names = sorted({program(pid) for pid in cgroups.own_processes(box)})
        raise ClusterError(f"no process {name} in {box}; there are {', '.join(names)}")
    for pid in found:
        os.kill(pid, number)


def program(pid: int) -> str:
    """The kernel knows the first 15 characters of a program's name."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def frozen(box: str) -> bool:
    return output("cat", cgroups.FREEZER / cgroups.path_of(box) / "freezer.state") != "THAWED"
