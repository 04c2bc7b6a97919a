"""Whose processes end with whom. With real ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.engines.vllm.inside.guard import DIRECTORY_VARIABLE, OWNER_VARIABLE

WAIT_S = 20.0

# Says that it watches, and would then stay for ever. It has as many files open as an engine under load.
ENGINE = """
import os, resource, time
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
from penstock.engines.vllm.inside.guard import die_with_owner
die_with_owner()
print("watching", flush=True)
time.sleep(1000)
"""

# Starts one in a thread that ends at once, as vLLM's are started, and stays.
WORKER = """
import pathlib, subprocess, sys, threading, time
from penstock.engines.vllm.inside.guard import own_engines
own_engines(pathlib.Path(sys.argv[1]) if sys.argv[1] else None)
for program in sys.argv[2:]:
    thread = threading.Thread(target=lambda: subprocess.Popen([sys.executable, "-c", program]))
    thread.start()
    thread.join()
time.sleep(1000)
"""


def run(program: str, *args: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *args],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_what_does_not_watch_ends_with_what_does() -> None:
    unaware = "import time; print('watching', flush=True); time.sleep(1000)"
    with run(WORKER, "", unaware, ENGINE) as worker:
        assert [read_line(worker), read_line(worker)] == ["watching", "watching"]
        assert worker.stdout is not None
        worker.kill()
        assert worker.stdout.read() == ""  # the pipe is closed when all of them have ended


def test_an_engine_ends_with_its_worker_and_removes_its_directory(tmp_path: Path) -> None:
    directory = tmp_path / "sockets"
    directory.mkdir()
    (directory / "events").touch()
    with run(WORKER, str(directory), ENGINE) as worker:
        assert read_line(worker) == "watching"
        assert worker.stdout is not None
        worker.send_signal(signal.SIGKILL)
        # The pipe's other end is the engine's by now: it is closed when that has ended.
        assert worker.stdout.read() == ""
        assert worker.wait(WAIT_S) == -signal.SIGKILL
    assert not directory.exists()


def test_an_engine_leaves_a_terminal_s_interrupt_to_its_worker() -> None:
    with run(ENGINE, **{OWNER_VARIABLE: str(os.getpid())}) as engine:
        assert read_line(engine) == "watching"
        engine.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            engine.wait(0.3)
        engine.kill()


def test_an_engine_whose_worker_is_gone_already_ends_at_once() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        assert gone.wait(WAIT_S) == 0
    with run(ENGINE, **{OWNER_VARIABLE: str(gone.pid), DIRECTORY_VARIABLE: ""}) as engine:
        assert engine.wait(WAIT_S) == -signal.SIGKILL


@pytest.mark.parametrize("owner", ["", "nobody", "-1"])
def test_what_no_worker_started_lives_on(owner: str) -> None:
    """vLLM loads the guard as a plugin wherever Penstock is installed."""
    with run(ENGINE, **{OWNER_VARIABLE: owner}) as alone:
        assert read_line(alone) == "watching"
        with pytest.raises(subprocess.TimeoutExpired):
            alone.wait(0.3)
        alone.kill()


def test_the_worker_itself_is_not_watched() -> None:
    program = "from penstock.engines.vllm.inside.guard import own_engines; own_engines(None)\n" + ENGINE
    with run(program) as worker:
        assert read_line(worker) == "watching"
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(0.3)
        worker.kill()
