"""Discovery over a directory: one JSON file per instance, its mtime a lease.

An instance is live while its file's mtime moves at least every `lease_s`. A file whose writer ran on this
machine vanishes as soon as that process is gone; for a folder shared by several machines only the lease
counts, measured by each watcher's own clock from when it last saw the mtime move, so that clocks need not
agree. Whoever sees a dead file removes it: a live owner that was merely slow writes it again, as all owners
do when somebody deletes the whole directory.

The directory is 0700 and writing to it is the only credential: keep it where only its owner writes.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import socket
import stat
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

import msgspec

from penstock.errors import ConfigError
from penstock.structs import Count, Registration, Word

log = logging.getLogger(__name__)

_SUFFIX = ".json"
_TEMPORARY_SUFFIX = ".tmp"
_SHOWN_CHARS = 200  # of what is wrong with a file, which may quote it


class FileDiscoverySettings(msgspec.Struct, frozen=True):
    """How fast a directory notices.

    lease_s: an instance whose file has not been touched for this long is gone. Short enough that another
        machine's death is noticed, long enough for a busy machine or a slow NFS server.
    poll_s: how often a watcher lists the directory. One listing costs 0.05 ms of CPU
        for 5 files, 1.7 ms for 256.
    files_max: files beyond this many are ignored, with a warning.
    file_bytes_max: a larger file is garbage.
    """

    lease_s: float = 5.0
    poll_s: float = 0.25
    files_max: int = 1024
    file_bytes_max: int = 16 * 1024

    @property
    def refresh_s(self) -> float:
        """Three chances to touch the file before the lease is over."""
        return self.lease_s / 3


class _Record(msgspec.Struct, frozen=True):
    """What a file holds. `pid` means something only to processes of the same `pid_space`."""

    registration: Registration
    pid_space: Word = ""
    pid: Count = 0


class FileDiscovery:
    """The `Discovery` port over a directory, created 0700 when missing."""

    def __init__(self, directory: Path, settings: FileDiscoverySettings | None = None) -> None:
        self.directory = directory
        self._settings = settings or FileDiscoverySettings()
        self._closed = asyncio.Event()
        self.trouble = ""

    async def register(self, registration: Registration) -> FileLease:
        """Write this instance's file and keep touching it until the lease is closed.

        Raises:
            ConfigError: the directory cannot be written.
        """
        lease = FileLease(self.directory, registration, self._settings)
        try:
            await asyncio.to_thread(lease.write)
        except OSError as error:
            raise ConfigError(f"discovery: cannot write to {self.directory}: {error.strerror}") from error
        lease.start()
        return lease

    async def watch(self) -> AsyncIterator[Mapping[str, Registration]]:
        scan = DirectoryScan(self.directory, self._settings)
        previous: Mapping[str, Registration] | None = None
        while not self._closed.is_set():
            current = await asyncio.to_thread(scan.instances)
            self.trouble = scan.trouble
            if current != previous:
                yield current
                previous = current
            try:
                await asyncio.wait_for(self._closed.wait(), self._settings.poll_s)
            except TimeoutError:
                pass

    async def close(self) -> None:
        """End all watches."""
        self._closed.set()


class FileLease:
    """One instance's file, and the task that keeps it fresh."""

    def __init__(
        self, directory: Path, registration: Registration, settings: FileDiscoverySettings
    ) -> None:
        self._path = directory / _file_name(registration.instance_id)
        self._epoch = registration.epoch
        self._content = msgspec.json.encode(_Record(registration, pid_space(), os.getpid()))
        self._settings = settings
        self.registered = False
        self.trouble = "not registered yet"
        self._refresher: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin refreshing; ends with `close`."""
        self.registered, self.trouble = True, ""
        self._refresher = asyncio.create_task(self._refresh_forever(), name=f"lease {self._path.stem}")

    async def close(self) -> None:
        if self._refresher is not None:
            self._refresher.cancel()
            await asyncio.gather(self._refresher, return_exceptions=True)
            self._refresher = None
            await asyncio.to_thread(self._remove)

    def write(self) -> None:
        """Replace the file at once, so that no reader ever sees half of it."""
        _make_private(self._path.parent)
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}{_TEMPORARY_SUFFIX}")
        temporary.write_bytes(self._content)
        temporary.replace(self._path)

    async def _refresh_forever(self) -> None:
        while True:
            await asyncio.sleep(self._settings.refresh_s)
            try:
                superseded = not await asyncio.to_thread(self._refresh)
            except OSError as error:
                if not self.trouble:
                    log.warning("discovery: cannot refresh %s (%s), trying on", self._path, error.strerror)
                self.trouble = f"cannot refresh {self._path}: {error.strerror}"
                continue
            except Exception:  # the task's top: a defect of ours must not end what keeps it listed
                log.exception("discovery: cannot refresh %s", self._path)
                self.trouble = f"cannot refresh {self._path}: an error here, see the log"
                continue
            self.trouble = ""
            if superseded:
                self.trouble = "a newer incarnation took over"
                log.warning("discovery: a newer incarnation took over %s", self._path.name)
                return

    def _refresh(self) -> bool:
        """Touch the file, or write it again when it was removed. False: a newer incarnation owns it."""
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            self.write()
            return True
        if content == self._content:
            os.utime(self._path)
        elif _epoch_in(content) > self._epoch:
            return False
        else:
            self.write()
        return True

    def _remove(self) -> None:
        try:
            if self._path.read_bytes() == self._content:
                self._path.unlink()
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("discovery: cannot remove %s: %s", self._path, error.strerror)


class _Seen(msgspec.Struct):
    """A file as a watcher knows it."""

    stamp: tuple[int, int, int]  # inode, mtime in ns, size: while equal, the content is not read again
    record: _Record | None  # None: garbage
    moved_at: float  # this process's monotonic clock when the mtime was last seen to move


class DirectoryScan:
    """Repeated listings of one directory. Blocking: run it in a thread, one call at a time."""

    def __init__(self, directory: Path, settings: FileDiscoverySettings) -> None:
        self._directory = directory
        self._settings = settings
        self._seen: dict[str, _Seen] = {}
        self._instances: dict[str, Registration] = {}
        self.trouble = ""  # why the last listing failed
        self._warned: set[str] = set()  # what has been warned of and not yet ended

    def instances(self) -> dict[str, Registration]:
        """The live instances by id; while the directory cannot be read, those of the last listing."""
        now = time.monotonic()
        try:
            seen = self._list(now)
        except OSError as error:
            self.trouble = f"cannot read {self._directory}: {error.strerror}"
            self._warn_once("outage", f"{self.trouble}; keeping what is known")
            return self._instances
        self.trouble = ""
        self._warned.discard("outage")
        self._seen = {name: entry for name, entry in seen.items() if self._keep(name, entry, now)}
        self._instances = {
            entry.record.registration.instance_id: entry.record.registration
            for entry in self._seen.values()
            if entry.record is not None
        }
        return self._instances

    def _list(self, now: float) -> dict[str, _Seen]:
        _make_private(self._directory)
        seen = {}
        for entry in self._entries():
            try:
                seen[entry.name] = self._look(entry, now)
            except FileNotFoundError:
                continue  # deregistered between the listing and the look
        return seen

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        count = 0
        with os.scandir(self._directory) as entries:
            for entry in entries:
                if entry.name.startswith(".") or not entry.name.endswith(_SUFFIX):
                    continue
                count += 1
                if count > self._settings.files_max:
                    self._warn_once(
                        "crowded", f"{self._directory} has over {count - 1} files; ignoring the rest"
                    )
                    return
                yield entry
        self._warned.discard("crowded")

    def _look(self, entry: os.DirEntry[str], now: float) -> _Seen:
        status = entry.stat()
        stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
        known = self._seen.get(entry.name)
        if known is not None and known.stamp == stamp:
            return known
        record = self._read(entry, status.st_size)
        if known is None and record is not None and record.pid_space == pid_space():
            age_s = max(0.0, time.time() - status.st_mtime)  # same machine, same clock
        else:
            age_s = 0.0
        return _Seen(stamp, record, now - age_s)

    def _read(self, entry: os.DirEntry[str], size: int) -> _Record | None:
        try:
            if not stat.S_ISREG(entry.stat().st_mode):  # reading a pipe would never end
                raise msgspec.ValidationError("it is not a file")
            if size > self._settings.file_bytes_max:
                raise msgspec.ValidationError(f"{size} bytes is too large")
            record = msgspec.json.decode(Path(entry.path).read_bytes(), type=_Record)
            if entry.name != _file_name(record.registration.instance_id):  # one file for each instance
                raise msgspec.ValidationError("instance_id: it is not what the file is named after")
        except FileNotFoundError:
            raise
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OSError) as error:
            self._warn_once(entry.path, f"ignoring {entry.path}: {str(error)[:_SHOWN_CHARS]}")
            return None
        self._warned.discard(entry.path)
        return record

    def _keep(self, name: str, entry: _Seen, now: float) -> bool:
        """Whether this file still stands for an instance (or is garbage that is not ours to judge)."""
        record = entry.record
        if record is None:
            return True
        owner_gone = record.pid_space == pid_space() and not _process_exists(record.pid)
        expired = now - entry.moved_at > self._settings.lease_s
        if owner_gone or expired:
            self._remove_stale(self._directory / name, entry.stamp)
            return False
        return True

    def _remove_stale(self, path: Path, stamp: tuple[int, int, int]) -> None:
        """Unlink unless it has changed since; if it changes in between, its owner writes it again."""
        try:
            status = path.stat()
            if (status.st_ino, status.st_mtime_ns, status.st_size) == stamp:
                path.unlink()
        except OSError:
            return  # gone already, or a folder we may only read: the entry is dropped all the same

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned and len(self._warned) < self._settings.files_max:
            self._warned.add(key)
            log.warning("discovery: %s", message)


def _file_name(instance_id: str) -> str:
    return quote(instance_id, safe="") + _SUFFIX


def _make_private(directory: Path) -> None:
    """Create it and its missing parents, each 0700 (`Path.mkdir` gives that mode to the last one only)."""
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        return
    except FileNotFoundError:
        _make_private(directory.parent)
        directory.mkdir(mode=0o700, exist_ok=True)


@functools.cache
def pid_space() -> str:
    """Names the set of processes whose pids this process can check: host, boot and pid namespace."""
    return "/".join(
        (socket.gethostname(), _first_line("/proc/sys/kernel/random/boot_id"), _pid_namespace())
    )


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""  # not Linux: the host's name has to do, and the lease covers a reboot


def _pid_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").stat().st_ino)
    except OSError:
        return ""


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # no process has such a number
        return False
    except PermissionError:
        return True
    return True


def _epoch_in(content: bytes) -> int:
    try:
        return msgspec.json.decode(content, type=_Record).registration.epoch
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return -1
