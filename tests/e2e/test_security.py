"""Real processes with keys, a secret and mutual TLS: who listens where, what is told, and how all of it is
replaced while requests are served."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.logs.quiet_log import BURST_LINES
from tests.e2e.conftest import ANSWER_S, MODEL, ROOT, START_S, STOP_S
from tests.link.test_tls import make_authority, make_certificate
from tests.ports import free_port
from tests.waiting import wait_until

LISTENING = "0A"  # a state in /proc/net/tcp


class Deployment:
    """Processes on this machine that share a folder of secrets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.key = ""
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        make_authority(folder, "ca")
        self.renew_certificates()
        self.set_secret("the first link secret")

    def renew_certificates(self) -> None:
        make_certificate(self.folder, "new", "ca", "IP:127.0.0.1")
        for kind in ("key", "pem"):
            os.replace(self.folder / f"new.{kind}", self.folder / f"own.{kind}")

    def set_secret(self, *secrets: str) -> None:
        new = self.folder / "new-secret"
        new.write_text("".join(f"{secret}\n" for secret in secrets))
        os.replace(new, self.folder / "secret")

    def set_key(self, name: str) -> str:
        """Make a key the only one; the key."""
        made = subprocess.run(
            [sys.executable, "-m", "penstock", "key", name],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        (self.folder / "keys").write_text(made.stdout)
        self.key = made.stderr.split()[-1]
        return self.key

    def start(self, name: str, *arguments: str, secret: str = "secret", **environ: str) -> None:
        own = str(self.folder / "own")
        files = ("--link-tls-cert", f"{own}.pem", "--link-tls-key", f"{own}.key")
        trusted = ("--link-tls-ca", str(self.folder / "ca.pem"))
        shared = ("--link-secret-file", str(self.folder / secret))
        found = ("--discovery", f"file:{self.folder / 'discovery'}", "--log-level", "debug")
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", "penstock", *arguments, *files, *trusted, *shared, *found],
                cwd=ROOT,
                env={**os.environ, **environ},
                stdout=log,
                stderr=log,
            )

    def worker(self, name: str, role: str, *more: str, secret: str = "secret") -> None:
        own = ("--role", role, "--model", "models/tiny", "--instance-id", name)
        self.start(name, "worker", *own, *more, secret=secret)

    def stop(self, name: str) -> None:
        process = self._processes.pop(name)
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        if process.poll() is None:
            process.kill()
            process.wait(STOP_S)

    @property
    def pids(self) -> dict[str, int]:
        return {name: process.pid for name, process in self._processes.items()}

    def ask(self, method: str, path: str, body: Any = None, key: str | None = None) -> tuple[int, str]:
        trusting = ssl.create_default_context(cafile=str(self.folder / "ca.pem"))
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=ANSWER_S, context=trusting)
        try:
            headers = {"authorization": f"Bearer {self.key if key is None else key}"}
            headers["content-type"] = "application/json"
            connection.request(method, path, body and json.dumps(body), headers)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def complete(self, key: str | None = None) -> tuple[int, str]:
        body = {"model": MODEL, "prompt": "My name is", "max_tokens": 2}
        return self.ask("POST", "/v1/completions", body, key)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        def holds() -> bool:
            with contextlib.suppress(OSError):
                return condition()
            return False

        wait_until(holds, lambda: self.logs()[-5000:], START_S, look_s=0.1)

    def ready(self, *names: str) -> bool:
        """Whether these are the instances that are ready."""
        instances = json.loads(self.ask("GET", "/health")[1])["instances"]
        return {found["instance_id"] for found in instances if found["state"] == "ready"} == set(names)

    def logs(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("*.log")))


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    deployment = Deployment(tmp_path_factory.mktemp("security"))
    deployment.set_key("team")
    ports = ("--http-port", str(deployment.port), "--api-keys-file", str(deployment.folder / "keys"))
    own = str(deployment.folder / "own")
    tls = ("--http-tls-cert", f"{own}.pem", "--http-tls-key", f"{own}.key")
    try:
        deployment.start(
            "frontend", "frontend", *ports, *tls, PENSTOCK_API_KEY="the-key-of-the-environment"
        )
        deployment.worker("prefill", "prefill", "--system-port", str(free_port()))
        deployment.worker("decode", "decode", "--transfer", "tcp")
        deployment.wait_for(lambda: deployment.ready("prefill", "decode"))
        yield deployment
    finally:
        for name in deployment.pids:
            deployment.stop(name)


def listening(pid: int) -> set[str]:
    """Local addresses, in the kernel's hex, at which a process takes connections."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(descriptor))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and f"socket:[{fields[9]}]" in inodes:
                found.add(fields[1].split(":")[0])
    return found


def test_nothing_listens_beyond_loopback_unless_told_to(deployment: Deployment) -> None:
    """HTTP, links, the KV transfer and the probes, all with their default addresses."""
    for name, pid in deployment.pids.items():
        assert listening(pid) == {"0100007F"}, name  # 127.0.0.1


def test_keys_of_the_file_and_of_the_environment_are_accepted_and_others_get_401(
    deployment: Deployment,
) -> None:
    assert deployment.complete()[0] == 200
    assert deployment.complete("the-key-of-the-environment")[0] == 200
    assert deployment.complete("another-key-that-is-wrong")[0] == 401
    assert deployment.ask("GET", "/metrics", key="none")[0] == 200


def test_a_key_is_replaced_without_a_restart(deployment: Deployment) -> None:
    old = deployment.key
    new = deployment.set_key("team")
    deployment.wait_for(lambda: deployment.complete(new)[0] == 200)
    assert deployment.complete(old)[0] == 401


def test_secret_and_certificates_are_replaced_while_requests_are_served(deployment: Deployment) -> None:
    """Each state of the rotation, with a worker that starts in it: it joins, and nothing fails."""
    first, second = "the first link secret", "the second link secret"
    pause_s = 1.5  # the file is looked at once a second
    for number, secrets in enumerate(((first, second), (second, first), (second,))):
        deployment.set_secret(*secrets)
        deployment.renew_certificates()
        time.sleep(pause_s)
        name = f"decode{number}"
        deployment.worker(name, "decode")
        deployment.wait_for(lambda name=name: deployment.ready("prefill", "decode", name))
        assert [deployment.complete()[0] for _ in range(4)] == [200] * 4
        deployment.stop(name)
    log = (deployment.folder / "frontend.log").read_text()
    assert "handshake" not in log
    assert "differ" not in log


def test_connections_that_never_end_their_handshake(deployment: Deployment) -> None:
    """Hundreds at each port with TLS: others are served, they are closed, and the log has a few lines."""
    health = json.loads(deployment.ask("GET", "/health")[1])
    links = [int(instance["address"].rpartition(":")[2]) for instance in health["instances"]]
    lines = deployment.logs().count("TLS handshake with")
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        silent = []
        for port in [deployment.port, *links]:
            for number in range(300):
                one = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=ANSWER_S))
                silent.append(one)
                if number % 2:
                    with contextlib.suppress(OSError):  # dropped already
                        one.sendall(b"\x16\x03\x01\x02\x00\x01\x00")
        deployment.worker("after", "decode")
        deployment.wait_for(lambda: deployment.ready("prefill", "decode", "after"))
        assert deployment.complete()[0] == 200
        for one in silent:
            with contextlib.suppress(ConnectionError):
                assert one.recv(1) == b""
    minutes = 2 + (time.monotonic() - began) // 60  # that it took some of
    assert deployment.logs().count("TLS handshake with") - lines <= 3 * minutes * BURST_LINES
    deployment.stop("after")


def test_who_has_another_secret_stays_outside(deployment: Deployment) -> None:
    (deployment.folder / "other").write_text("a secret that nobody else has")
    deployment.worker("late", "decode", secret="other")
    frontend_log = deployment.folder / "frontend.log"
    deployment.wait_for(
        lambda: "the link secrets of frontend and worker differ" in frontend_log.read_text()
    )
    assert deployment.ready("prefill", "decode")
    assert deployment.complete()[0] == 200
    deployment.stop("late")


def test_no_secret_is_told_to_anybody(deployment: Deployment) -> None:
    """Logs at debug level, metrics, health, errors, command lines: after all that the tests above did."""
    deployment.complete()
    told = deployment.logs()
    told += deployment.ask("GET", "/metrics")[1] + deployment.ask("GET", "/health")[1]
    told += deployment.complete("another-key-that-is-wrong")[1]
    for pid in deployment.pids.values():
        told += Path(f"/proc/{pid}/cmdline").read_text()
    assert "routing decision" in told  # it is the debug level
    private = (deployment.folder / "own.key").read_text().splitlines()[1]
    keys = (deployment.key, "the-key-of-the-environment", "another-key-that-is-wrong")
    for secret in (
        *keys,
        "secret that nobody else has",
        "first link secret",
        "second link secret",
        private,
    ):
        assert secret not in told
