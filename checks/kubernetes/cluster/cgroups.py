"""Control groups: they hold everything that runs in the cluster, so that all of it can be found again.

Every process of a box, and of the pods in it, is in a control group below `penstock-cluster/BOX`. Nothing
has to be remembered about processes: to freeze a box is to freeze its group, to end it is to kill what is
in its group. That is also how the remains of a killed run are found.

Control groups of version 1, as `mount -t cgroup` shows them: each controller has a tree of its own. The
tree "unified" has no controllers; container runtimes make groups in it, too, which must be removed with the
others.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from checks.kubernetes.cluster.command import ClusterError, wait_until
from checks.kubernetes.cluster.places import NAME

ROOT = Path("/sys/fs/cgroup")
FREEZER = ROOT / "freezer"
NEEDED = ("cpu", "cpuset", "devices", "freezer", "memory", "pids")
END_S = 30.0


def supported() -> bool:
    """Whether this machine has the control groups that the cluster needs."""
    return all((ROOT / controller / "cgroup.procs").exists() for controller in NEEDED)


def trees() -> list[Path]:
    return [file.parent for file in sorted(ROOT.glob("*/cgroup.procs"))]


def path_of(box: str) -> str:
    """The group of a box, in each tree."""
    return f"{NAME}/{box}"


def create(box: str) -> list[Path]:
    """Make a box's groups; the files into which a process writes "0" to join them."""
    joins = []
    for tree in trees():
        if tree.name == "unified":
            continue
        parent = tree / NAME
        group = tree / path_of(box)
        group.mkdir(parents=True, exist_ok=True)
        if tree.name == "cpuset":  # begins empty, and takes no process until it is filled
            for name in ("cpuset.cpus", "cpuset.mems"):
                (parent / name).write_text((tree / name).read_text())
                (group / name).write_text((tree / name).read_text())
        joins.append(group / "cgroup.procs")
    return joins


def boxes() -> list[str]:
    """Boxes that have a control group, also if nothing runs in it any more."""
    return sorted({group.name for tree in trees() for group in (tree / NAME).glob("*/")})


def own_processes(box: str) -> list[int]:
    """The processes of the box itself, without those of pods."""
    return members(FREEZER / path_of(box))


def all_processes(box: str) -> set[int]:
    """Those of pods, too."""
    return {pid for group in groups(FREEZER / path_of(box)) for pid in members(group)}


def groups(top: Path) -> list[Path]:
    """A group and all groups in it, inner ones first. None when it is not there."""
    return [Path(folder) for folder, _, _ in os.walk(top, topdown=False)]


def members(group: Path) -> list[int]:
    try:
        return [int(line) for line in (group / "cgroup.procs").read_text().split()]
    except OSError:
        return []  # it was removed meanwhile


def freeze(box: str) -> None:
    set_freezer(box, "FROZEN")


def thaw(box: str) -> None:
    set_freezer(box, "THAWED")


def set_freezer(box: str, state: str) -> None:
    file = FREEZER / path_of(box) / "freezer.state"
    file.write_text(state)
    wait_until(
        lambda: file.read_text().strip() == state, f"{box} {state.lower()}", timeout_s=10, every_s=0.02
    )


def end(box: str) -> None:
    """Kill all that runs in a box, and remove its groups. Nothing when it has none."""
    with contextlib.suppress(FileNotFoundError):
        thaw(box)  # what is frozen does not die
    deadline = time.monotonic() + END_S
    while running := all_processes(box):
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise ClusterError(f"{box} does not end: processes {sorted(running)} survive SIGKILL")
        time.sleep(0.05)
    for tree in trees():
        remove(tree / path_of(box), deadline)


def remove(group: Path, deadline: float) -> None:
    """A group can be removed once the last process in it has been reaped, and there are no groups in it."""
    while group.exists():
        for inner in groups(group):
            with contextlib.suppress(OSError):
                inner.rmdir()
        if group.exists():
            if time.monotonic() > deadline:
                raise ClusterError(f"the control group {group} cannot be removed")
            time.sleep(0.05)


def remove_top() -> None:
    """The group around the boxes, once all of them are gone."""
    deadline = time.monotonic() + END_S
    for tree in trees():
        remove(tree / NAME, deadline)
