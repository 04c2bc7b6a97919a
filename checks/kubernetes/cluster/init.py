"""The first process of a box: it furnishes the box, starts its services, and starts them again when they
end.

It runs as process 1 in namespaces of its own (mounts, host name, processes, network, shared memory) on the
machine's own file system. What a computer of the cluster writes is kept apart from the machine by mounts
that exist in the box only, and end with it:

- /run is empty; /etc and /var show what the machine has, and changes to them stay in the box
- /var/lib/containerd, /var/lib/kubelet and /var/log are folders on the box's disk, which survives a restart
- some kernel settings are the whole machine's, and the kubelet must write them: it writes to copies

Standard library only, and nothing of this project: started as `python init.py BOX.json`. The file says

    {"name": host name, "address": "10.200.0.11/24", "routes": [[network, via], ...],
     "disk": folder, "shared": folder that is /run/cluster in the box,
     "services": [{"name": ..., "command": [...], "log": file, "after": [what must answer first, ...]}]}

where what must answer is the path of a socket, or a URL; a certificate there must be signed by the
cluster's own authority, /run/cluster/keys/ca.crt.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

SHARED = Path("/run/cluster")
ON_DISK = ("/var/lib/containerd", "/var/lib/kubelet", "/var/log")
SETTINGS_OF_THE_MACHINE = (
    "kernel/keys/root_maxbytes",
    "kernel/keys/root_maxkeys",
    "kernel/panic",
    "kernel/panic_on_oops",
    "vm/overcommit_memory",
    "vm/panic_on_oom",
)
LOOK_AGAIN_S = 0.1
RESTART_S = 1.0


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def furnish(box: dict[str, Any]) -> None:
    # A kubelet passes mounts on to pods, and sees what they mount, where mounts are shared.
    run("mount", "--make-rshared", "/")
    # Held open: where these folders are may be hidden by what is mounted next.
    disk, shared = os.open(box["disk"], os.O_PATH), os.open(box["shared"], os.O_PATH)
    run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
    for place in ("/etc", "/var"):
        changes = Path("/run/changes") / place[1:]
        for part in ("upper", "work"):
            (changes / part).mkdir(parents=True)
        options = f"lowerdir={place},upperdir={changes / 'upper'},workdir={changes / 'work'}"
        run("mount", "-t", "overlay", "-o", options, "overlay", place)
    bind(f"/proc/{os.getpid()}/fd/{shared}", str(SHARED))
    for place in ON_DISK:
        inside = f"/proc/{os.getpid()}/fd/{disk}{place}"
        Path(inside).mkdir(parents=True, exist_ok=True)
        bind(inside, place)
    for setting in SETTINGS_OF_THE_MACHINE:
        file = Path("/proc/sys") / setting
        if file.exists():
            copy = Path("/run/settings") / setting
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
            run("mount", "--bind", str(copy), str(file))
    os.close(disk)
    os.close(shared)


def bind(source: str, place: str) -> None:
    Path(place).mkdir(parents=True, exist_ok=True)
    run("mount", "--no-canonicalize", "--bind", source, place)


def connect(box: dict[str, Any]) -> None:
    """Give the box its address, once its cable (eth0) is plugged in."""
    socket.sethostname(box["name"])
    for setting in ("ipv4/ip_forward", "bridge/bridge-nf-call-iptables"):
        Path("/proc/sys/net", setting).write_text("1")
    while "eth0" not in (name for _, name in socket.if_nameindex()):
        time.sleep(0.02)
    run("ip", "link", "set", "lo", "up")
    run("ip", "address", "add", box["address"], "dev", "eth0")
    run("ip", "link", "set", "eth0", "up")
    for network, via in box["routes"]:
        run("ip", "route", "add", network, "via", via)


def answers(what: str) -> bool:
    try:
        if what.startswith("/"):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(what)
        else:
            trusted = ssl.create_default_context(cafile=str(SHARED / "keys" / "ca.crt"))
            with urllib.request.urlopen(what, timeout=2, context=trusted):
                pass
    except OSError:
        return False
    return True


def start(service: dict[str, Any]) -> int:
    # Not by subprocess, which waits for processes of its own accord: we would not hear of their end.
    appended = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    return os.posix_spawnp(
        service["command"][0],
        service["command"],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, service["log"], appended, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )


def supervise(services: list[dict[str, Any]]) -> None:
    """Start services once they may, start ended ones again, and reap what else ends here."""
    running: dict[int, dict[str, Any]] = {}
    waiting = [(0.0, service) for service in services]
    while True:
        for entry in list(waiting):
            not_before, service = entry
            if time.monotonic() >= not_before and all(map(answers, service["after"])):
                running[start(service)] = service
                waiting.remove(entry)
        # With nothing to start, sleep until a process ends.
        pid, status = os.waitpid(-1, os.WNOHANG if waiting else 0) if running else (0, 0)
        if pid in running:
            service = running.pop(pid)
            print(
                f"{time.strftime('%T')} {service['name']} ended ({status}): starting it again", flush=True
            )
            waiting.append((time.monotonic() + RESTART_S, service))
        elif pid == 0:
            time.sleep(LOOK_AGAIN_S)


def main() -> None:
    box = json.loads(Path(sys.argv[1]).read_text())
    furnish(box)
    connect(box)
    supervise(box["services"])


if __name__ == "__main__":
    main()
