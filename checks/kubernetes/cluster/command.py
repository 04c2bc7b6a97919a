"""Running other programs, and saying what happens.

The cluster is put together from programs (apt, go, ip, openssl, kubectl). Whatever one of them prints is
kept out of the way while it succeeds, and is shown when it fails.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

Argument = str | Path


class ClusterError(Exception):
    """The cluster cannot do what was asked. The message is one line for the person who asked."""


def say(text: str) -> None:
    """One line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def run(
    *command: Argument,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end. `env` is added to this process's environment.

    Raises ClusterError with the end of its output when it fails, unless `check` is False.

    It inherits the lock on the build, if this process has that: should this process be killed, the next
    build waits for what still runs of the one before.
    """
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        input="" if stdin is None else stdin,
        capture_output=True,
        text=True,
        close_fds=False,
        check=False,
    )
    if check and done.returncode != 0:
        raise ClusterError(failure(command, done))
    return done


def failure(command: Sequence[Argument], done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    shown = " ".join(str(part) for part in command)
    if len(shown) > 200:
        shown = shown[:200] + "..."
    return f"`{shown}` ended with {done.returncode}: " + "\n".join(lines[-10:])


def output(*command: Argument, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """What a program printed, without the newline at its end."""
    return run(*command, cwd=cwd, env=env).stdout.rstrip("\n")


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float, every_s: float = 0.1) -> None:
    """Look again until `condition` holds. After `timeout_s`, raises ClusterError that names `what`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(every_s)
