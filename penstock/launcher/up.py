"""`penstock up`: runs the supervisor in the foreground, or starts one in the background."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from penstock.errors import ConfigError, PenstockError
from penstock.graph import Graph
from penstock.launcher.control import ControlRequest, LocalGraphStatus, call
from penstock.launcher.gpus import visible_gpus
from penstock.launcher.launches import gpus_needed, labels
from penstock.launcher.output import Console
from penstock.launcher.settings import LauncherSettings
from penstock.launcher.state import StateFolder, own_command
from penstock.launcher.supervisor import PROGRAM, Supervisor

START_TIMEOUT_S = 900.0  # a large model may have to be downloaded first
STOP_TIMEOUT_S = 900.0  # longer than drain times; for a process that cannot be killed

_POLL_S = 0.1


def run_graph(
    graph: Graph,
    folder: StateFolder,
    environ: Mapping[str, str],
    settings: LauncherSettings,
    *,
    quiet: bool = False,
    program: Sequence[str] = PROGRAM,
) -> None:
    """Run a graph until a signal stops it.

    Raises:
        ConfigError: the graph is running already, or cannot run on this machine.
    """
    with folder.locked():
        width = max(len(label) for label in labels(graph).values()) + len("-00")
        console = Console(width=width)
        try:
            supervisor = Supervisor(
                graph,
                folder,
                visible_gpus(environ) if any(map(gpus_needed, graph.services)) else [],
                environ,
                settings,
                console,
                show_output=not quiet,
                program=program,
            )
            asyncio.run(_run_until_signalled(supervisor))
        finally:
            console.close()


async def _run_until_signalled(supervisor: Supervisor) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, supervisor.interrupt)
    # A terminal that closes sends SIGHUP twice, by its shell and by the kernel: the second must not kill
    # anything. Under nohup, SIGHUP stays ignored.
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        loop.add_signal_handler(signal.SIGHUP, supervisor.stop)
    await supervisor.run()


def start_detached(folder: StateFolder, arguments: Sequence[str]) -> LocalGraphStatus:
    """Start `penstock up ARGUMENTS` in a session of its own, and wait until the graph is ready.

    Raises:
        ConfigError: the graph is running already, or its supervisor ended before it was ready.
    """
    if folder.is_running():
        raise ConfigError(f"{folder.graph} is already running; stop it: {own_command()} down")
    folder.prepare()
    errors = folder.logs / "supervisor.err"
    with errors.open("wb") as stderr:
        supervisor = subprocess.Popen(
            [*PROGRAM, "up", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
    try:
        return _until_ready(folder, supervisor, errors)
    except KeyboardInterrupt:
        supervisor.terminate()  # a user who stops waiting does not want the graph
        raise


def _until_ready(
    folder: StateFolder, supervisor: subprocess.Popen[bytes], errors: Path
) -> LocalGraphStatus:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if supervisor.poll() is not None:
            raise ConfigError(
                _last_words(errors) or f"the supervisor ended with code {supervisor.returncode}"
            )
        status = _status_or_none(folder)
        if status is not None and status.ready and status.pid == supervisor.pid:
            supervisor.returncode = 0  # prevents the warning that the process still runs
            return status
        time.sleep(_POLL_S)
    raise ConfigError(
        f"{folder.graph} is not ready after {START_TIMEOUT_S:g} s; see: {own_command()} status"
    )


def stop_graph(folder: StateFolder) -> None:
    """Stop a running graph, and wait until its supervisor has ended. Raises ConfigError."""
    call(folder, ControlRequest(op="down"))
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while folder.is_running():
        if time.monotonic() > deadline:
            raise ConfigError(f"{folder.graph} has not stopped within {STOP_TIMEOUT_S:g} s")
        time.sleep(_POLL_S)


def follow_restart(folder: StateFolder, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The names of these replicas, each as soon as it has been replaced, with the name of its successor
    (empty if it has none). Raises ConfigError when the restart stops early."""
    left = list(names)
    while left:
        status = call(folder, ControlRequest(op="status")).status
        if status is None or status.restart_error:
            raise ConfigError(status.restart_error if status else "the supervisor gave no status")
        while left and left[0] not in status.restarting:
            name = left.pop(0)
            yield name, status.replaced.get(name, "")
        time.sleep(_POLL_S)


def _status_or_none(folder: StateFolder) -> LocalGraphStatus | None:
    try:
        return call(folder, ControlRequest(op="status")).status
    except PenstockError:
        return None  # the supervisor does not listen yet


def _last_words(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("penstock: ") if lines else ""
