"""The folder in which a running graph keeps its files: lock, control socket, secret, discovery and logs.

.penstock/                  or PENSTOCK_STATE_DIR
  local/                    one folder per graph, 0700
    lock                    locked (flock) while the supervisor runs; contains its pid
    control.sock            see control.py
    secret                  of the links between the graph's processes; new at each start
    discovery/NAMESPACE/    the running workers, see discovery/file.py
    logs/SERVICE/NAME.log   output of each replica; NAME.log.1 holds the output before
    logs/supervisor.log
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from penstock.errors import ConfigError
from penstock.launcher.output import leads_to
from penstock.options.config import STATE_VARIABLE

_DEFAULT_ROOT = ".penstock"
_LOCK_TRIES = 5
_LOCK_PAUSE_S = 0.02
_SOCKET_PATH_BYTES_MAX = 107  # sun_path in unix(7), less its final zero


class AlreadyRunning(ConfigError):
    """Another process holds the graph's lock."""


class StateFolder:
    """The paths of one graph, and the lock on them."""

    def __init__(self, root: Path, graph: str) -> None:
        self.graph = graph
        self.path = root.absolute() / graph
        self.discovery = self.path / "discovery"
        self.logs = self.path / "logs"
        self.secret = self.path / "secret"
        self._lock = self.path / "lock"
        self._held: TextIO | None = None  # the lock's file, while this process holds the lock
        self._secret_text = ""

    @property
    def socket(self) -> str:
        """The control socket's path, absolute or relative, whichever is shorter. Raises ConfigError."""
        path = _shorter(str(self.path / "control.sock"))
        if len(os.fsencode(path)) > _SOCKET_PATH_BYTES_MAX:
            raise ConfigError(f"{path}: too long for a socket; set {STATE_VARIABLE} to a shorter path")
        return path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder and prepare it for a start. The lock ends with this process at the latest.

        Raises:
            ConfigError: another process holds the lock, or the folder cannot be written.
        """
        self.prepare()
        self._held = self._take_lock()
        try:
            self._clear_leftovers()
            self._secret_text = secrets.token_urlsafe(32)
            self._write_secret()
            yield
        finally:
            self._held.close()
            self._held = None

    def restore(self) -> bool:
        """Make again what was deleted while the graph runs: the folder, the lock, the secret. The graph's
        processes do the same for their logs and registrations.

        Returns:
            whether anything was missing.

        Raises:
            AlreadyRunning: another process has made the folder again and holds the lock.
            ConfigError: the folder cannot be written.
        """
        assert self._held is not None
        has_lock, has_secret = leads_to(self._lock, self._held), self.secret.exists()
        if has_lock and has_secret:
            return False
        self.prepare()
        if not has_lock:
            lock = self._take_lock()
            self._held.close()
            self._held = lock
        if not has_secret:
            self._write_secret()
        return True

    def is_running(self) -> bool:
        """Whether a process holds the lock. Raises ConfigError when the lock cannot be tested."""
        try:
            with self._lock.open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        except OSError as error:
            raise self._unlockable(error) from error
        return False

    def prepare(self) -> None:
        """Make the folders, private to this user. Raises ConfigError."""
        root = self.path.parent
        try:
            for folder in (root, self.path, self.logs):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in (self.path, self.logs):
                folder.chmod(0o700)  # even if another program made it
            ignore = root / ".gitignore"
            if root.name == _DEFAULT_ROOT and not ignore.exists():
                ignore.write_text("*\n")
        except OSError as error:
            raise self._unwritable(error) from error

    def _take_lock(self) -> TextIO:
        """Lock the lock's file, and write this process's id into it. Raises ConfigError."""
        try:
            lock = os.fdopen(os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o600), "r+")
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            if not _lock_exclusively(lock):
                holder = lock.read().strip() or "unknown"
                raise AlreadyRunning(
                    f"{self.graph} is already running (pid {holder}); stop it: {own_command()} down"
                )
            lock.truncate(0)
            lock.write(f"{os.getpid()}\n")
            lock.flush()
        except OSError as error:
            lock.close()
            raise self._unlockable(error) from error
        except ConfigError:
            lock.close()
            raise
        return lock

    def _write_secret(self) -> None:
        """Raises ConfigError."""
        try:
            descriptor = os.open(self.secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(self._secret_text)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(f"cannot write to {self.path}: {error.strerror}")

    def _unlockable(self, error: OSError) -> ConfigError:
        """For file systems without locks, as some shared ones are."""
        return ConfigError(f"cannot lock {self._lock}: {error.strerror}")

    def _clear_leftovers(self) -> None:
        """Remove what a killed supervisor left behind."""
        (self.path / "control.sock").unlink(missing_ok=True)
        shutil.rmtree(self.discovery, ignore_errors=True)
        self.secret.unlink(missing_ok=True)


def _lock_exclusively(lock: TextIO) -> bool:
    """Tries for a moment, since `is_running` of another process takes the lock briefly."""
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOCK_PAUSE_S)
        else:
            return True
    return False


def own_command() -> str:
    """The command by which the user can call this program from the working directory. `penstock` may not
    be on the PATH, may be another program there, or may not be installed at all."""
    script = Path(sys.executable).with_name("penstock")
    if not script.exists():
        return f"{_shorter(sys.executable)} -m penstock"
    found = shutil.which("penstock")
    is_on_path = found is not None and os.path.samefile(found, script)
    return "penstock" if is_on_path else _shorter(str(script))


def _shorter(path: str) -> str:
    """The absolute path, or the path from the working directory, whichever is shorter."""
    return min(os.path.relpath(path), path, key=len)


def state_root(environ: Mapping[str, str]) -> Path:
    """The folder that holds all graphs' folders."""
    return Path(environ.get(STATE_VARIABLE) or _DEFAULT_ROOT).expanduser()


def running_states(root: Path) -> list[StateFolder]:
    """The folders of all graphs whose supervisor runs, sorted by name."""
    return [folder for folder in _states(root) if folder.is_running()]


def _states(root: Path) -> list[StateFolder]:
    return [StateFolder(root, name) for name in sorted(lock.parent.name for lock in root.glob("*/lock"))]


def find_state(root: Path, graph: str = "", *, running: bool = True) -> StateFolder:
    """The folder of the graph with this name, or of the only graph.

    Args:
        running: consider only graphs whose supervisor runs; else a single running graph is preferred.

    Raises:
        ConfigError: there is no such graph, or there are several and `graph` names none.
    """
    folders = _states(root)
    living = running_states(root)
    if running or (len(living) == 1 and not graph):
        folders = living
    if graph:
        folders = [folder for folder in folders if folder.graph == graph]
    if len(folders) == 1:
        return folders[0]
    if folders:
        names = ", ".join(folder.graph for folder in folders)
        raise ConfigError(f"there are several graphs, name one with --graph: {names}")
    subject = f"{graph}: not" if graph else "no graph is"
    raise ConfigError(f"{subject} {'running' if running else 'known'} (looked in {root.absolute()})")
