"""The supervisor as a process of its own: signals, sudden death, and what the next start finds."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock.errors import ConfigError
from penstock.launcher.control import ControlRequest, LocalGraphStatus, call
from penstock.launcher.places import Places
from penstock.launcher.state import StateFolder, find_state, own_command
from penstock.launcher.tail import follow_logs
from penstock.launcher.up import stop_graph
from tests.launcher.conftest import EVENTUALLY_S, alive
from tests.waiting import wait_until

HOST = Path(__file__).with_name("host.py")

MANIFEST = """
apiVersion: nvidia.com/v1alpha1
kind: DynamoGraphDeployment
metadata: {name: toy}
spec:
  services:
    Frontend:
      extraPodSpec: {mainContainer: {command: [penstock, frontend]}}
    Worker:
      replicas: 2
      extraPodSpec: {mainContainer: {command: [penstock, worker, --role, decode, --model, m]}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> StateFolder:
    return StateFolder(tmp_path / "s", "toy")


@pytest.fixture
def start(tmp_path: Path, folder: StateFolder) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    manifest = tmp_path / "toy.yaml"
    manifest.write_text(MANIFEST)
    started: list[subprocess.Popen[str]] = []

    def start_one(*before: str, **env: str) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [*before, sys.executable, str(HOST), str(manifest), str(folder.path.parent)],
                env=os.environ | env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start_one
    for process in started:
        process.kill()
        process.communicate()


def ready(folder: StateFolder) -> LocalGraphStatus:
    def status() -> LocalGraphStatus | None:
        try:
            found = call(folder, ControlRequest(op="status")).status
        except ConfigError:
            return None
        return found if found.ready else None

    return wait_until(status, within_s=EVENTUALLY_S)


def pids(status: LocalGraphStatus) -> list[int]:
    return [replica.pid for service in status.services for replica in service.replicas]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_everything(start, folder, number: int) -> None:
    process = start()
    children = pids(ready(folder))
    process.send_signal(number)
    out, errors = process.communicate(timeout=EVENTUALLY_S)
    assert (process.returncode, errors) == (0, "")
    assert "decode-1  " in out
    assert not any(map(alive, children))
    assert not folder.is_running()


HEARS_HUP = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_a_terminal_that_closes_says_so_twice_and_kills_nothing(start, folder) -> None:
    process = start(sys.executable, "-c", HEARS_HUP, STUB_DRAIN_S="1")  # even below nohup
    ready(folder)
    began = time.monotonic()
    process.send_signal(signal.SIGHUP)
    wait_until(lambda: b"draining" in (folder.logs / "Worker" / "decode-0.log").read_bytes())
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=EVENTUALLY_S)
    assert process.returncode == 0
    assert time.monotonic() - began >= 1


def test_nohup_means_it(start, folder) -> None:
    process = start("sh", "-c", "trap '' HUP; exec \"$@\"", "sh")
    children = pids(ready(folder))
    process.send_signal(signal.SIGHUP)
    call(folder, ControlRequest(op="scale", replicas={"Worker": 3}))
    assert set(children) < set(pids(wait_until(lambda: ready(folder))))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=EVENTUALLY_S)
    assert process.returncode == 0


def test_children_do_not_outlive_a_killed_supervisor_and_the_next_start_works(start, folder) -> None:
    process = start()
    children = pids(ready(folder))
    assert len(children) == 3
    process.kill()
    process.wait()
    wait_until(lambda: not any(map(alive, children)))
    assert (folder.path / "control.sock").exists()
    with pytest.raises(ConfigError, match=r"^toy is not running$"):
        call(folder, ControlRequest(op="status"))
    with pytest.raises(ConfigError, match=r"^no graph is running"):
        find_state(folder.path.parent)
    start()
    assert ready(folder).graph == "toy"


def test_a_second_start_says_so(start, folder) -> None:
    first = start()
    ready(folder)
    second = start()
    _, errors = second.communicate(timeout=EVENTUALLY_S)
    assert second.returncode == 1
    assert errors == f"penstock: toy is already running (pid {first.pid}); stop it: {own_command()} down\n"
    assert ready(folder).pid == first.pid


def test_down_waits_until_all_is_gone(start, folder) -> None:
    process = start()
    children = pids(ready(folder))
    assert find_state(folder.path.parent).graph == "toy"
    stop_graph(folder)
    assert not any(map(alive, children))
    process.communicate(timeout=EVENTUALLY_S)
    assert process.returncode == 0


def test_following_logs_ends_with_the_graph(start, folder) -> None:
    start()
    ready(folder)
    lines = follow_logs(folder, ["decode"])
    call(folder, ControlRequest(op="scale", replicas={"Worker": 3}))
    seen = []
    for name, line in lines:
        seen.append((name, line.split(" --")[0]))
        if name == "decode-2" and line.startswith("started"):
            call(folder, ControlRequest(op="down"))
    assert ("decode-2", "started worker") in seen
    assert ("decode-0", "draining") in seen


def test_a_port_in_use_is_one_line() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            Places((), "127.0.0.1", port).check_port()
        assert str(caught.value) == (
            f"port {port} on 127.0.0.1: Address already in use; choose another with --port"
        )
    with pytest.raises(ConfigError, match="choose another with --port"):
        Places((), "203.0.113.1", 8000).check_port()
