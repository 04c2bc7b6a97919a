"""Whose cluster runs on this machine.

Addresses and names are fixed, so there is one cluster at a time, whoever starts it from whichever checkout.
A note in /run says whose it is; it counts for as long as what it speaks of is there. What a killed start or
a killed cluster left behind belongs to nobody: the next start takes it away.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from checks.kubernetes.cluster.command import ClusterError
from checks.kubernetes.cluster.places import CHECKOUT, KUBECONFIG, RUNTIME, STATE

LOCK = RUNTIME / "lock"
NOTE = RUNTIME / "owner.json"


@dataclass(frozen=True)
class Owner:
    checkout: str
    state: str  # folder
    kubeconfig: str
    nodes: int
    since: str  # local time
    complete: bool  # false while it starts, and for ever when the start was killed

    @property
    def is_us(self) -> bool:
        return self.checkout == str(CHECKOUT)

    def refusal(self) -> str:
        return (
            f"the cluster of {self.checkout} runs on this machine since {self.since}: use it with "
            f"KUBECONFIG={self.kubeconfig}, or end it with `make cluster-down`"
        )


def owner() -> Owner | None:
    """Whose cluster the note speaks of."""
    try:
        return Owner(**json.loads(NOTE.read_text()))
    except FileNotFoundError:
        return None


def write(nodes: int, complete: bool) -> None:
    note = Owner(str(CHECKOUT), str(STATE), str(KUBECONFIG), nodes, time.strftime("%F %T"), complete)
    partial = NOTE.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(note)))
    partial.rename(NOTE)


@contextmanager
def changing() -> Iterator[None]:
    """One start or end of a cluster at a time. Raises ClusterError that says whose is going on."""
    RUNTIME.mkdir(exist_ok=True)
    with LOCK.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise ClusterError(f"a cluster is being started or ended: by {lock.read()}") from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} in {CHECKOUT}")
        lock.flush()
        yield
