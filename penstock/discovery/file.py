"""Discovery by files in a directory: one JSON file per instance, kept fresh by its mtime.

An instance counts as running while its file's mtime changes at least every `lease_s`. Each watcher measures
this by its own clock, from the last change that it saw. It does not compare the mtime with its clock, since
the file server's clock may differ. If the file was written by a process on this machine, the instance is
also gone as soon as that process is. A watcher removes the file of an instance that is gone. An owner that
was only slow writes its file again; so do all owners after the whole directory was deleted.

A network directory may stop answering for good. So all files are read and written in threads, for which no
caller waits longer than `answer_s`.

The directory has mode 0700, and the right to write to it is the only credential: keep it where only its
owner can write.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import os
import socket
import stat
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

import msgspec

from penstock.detached import PatientCaller
from penstock.discovery.outage import Outage
from penstock.errors import ConfigError
from penstock.shapes import Count, Registration, Word

log = logging.getLogger(__name__)

_SUFFIX = ".json"
_TEMPORARY_SUFFIX = ".tmp"
_SHOWN_CHARS = 200  # of an error message, which may quote the file


class FileDiscoverySettings(msgspec.Struct, frozen=True):
    """The times and limits of discovery by files.

    lease_s: an instance whose file did not change for this long counts as gone. Short enough to notice the
        death of another machine, long enough for a busy machine or a slow NFS server.
    poll_s: how often a watcher lists the directory. A listing costs 0.05 ms of CPU for 5 files, 1.7 ms for
        256.
    files_max: further files are ignored, with a warning.
    file_bytes_max: a larger file is ignored, with a warning.
    answer_s: how long the directory may take to answer before that counts as an outage, for example because
        a file server is gone; and how long an instance that leaves waits for the removal of its file.
    """

    lease_s: float = 5.0
    poll_s: float = 0.25
    files_max: int = 1024
    file_bytes_max: int = 16 * 1024
    answer_s: float = 2.5

    @property
    def refresh_s(self) -> float:
        """A third of the lease: the file is refreshed up to three times in one lease."""
        return self.lease_s / 3


class _FileContent(msgspec.Struct, frozen=True):
    """The content of a file. `pid` has a meaning only for processes in the same `pid_space`."""

    registration: Registration
    pid_space: Word = ""
    pid: Count = 0


class FileDiscovery:
    """The `Discovery` port over a directory. A missing directory is created with mode 0700."""

    def __init__(self, directory: Path, settings: FileDiscoverySettings | None = None) -> None:
        self.directory = directory
        self._settings = settings or FileDiscoverySettings()
        self._closed = asyncio.Event()
        self.trouble = "not read yet"

    async def register(self, registration: Registration) -> FileLease:
        """Write this instance's file, and keep it fresh until the lease is closed. While the directory does
        not answer, the lease reports this in `trouble`, and keeps trying.

        Raises:
            ConfigError: the directory cannot be written, or the registration is too long for a file.
        """
        lease = FileLease(self.directory, registration, self._settings)
        await lease.start()
        return lease

    async def watch(self) -> AsyncIterator[Mapping[str, Registration]]:
        scan = DirectoryScan(self.directory, self._settings)
        caller: PatientCaller[dict[str, Registration]] = PatientCaller(self._settings.answer_s)
        outage = Outage(log, f"discovery: {self.directory}", "the last known instances stay")
        previous: Mapping[str, Registration] | None = None
        while not self._closed.is_set():
            try:
                current = await caller.result(scan.instances)
            except OSError as error:  # TimeoutError is one
                self.trouble = f"cannot read {self.directory}: {error.strerror or error}"
                outage.began(self.trouble)
            else:
                self.trouble = ""
                outage.ended()
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


_SUPERSEDED = "another incarnation holds its file"


class FileLease:
    """One instance's file, and the task that keeps it fresh."""

    def __init__(
        self, directory: Path, registration: Registration, settings: FileDiscoverySettings
    ) -> None:
        self._path = directory / _file_name(registration.instance_id)
        self._epoch = registration.epoch
        self._content = msgspec.json.encode(_FileContent(registration, pid_space(), os.getpid()))
        self._settings = settings
        self.registered = False
        self.trouble = "not registered yet"
        self._caller: PatientCaller[bool] = PatientCaller(settings.answer_s)
        self._outage = Outage(log, f"discovery: {directory}", "this instance keeps trying to register")
        self._refresher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Write the file, then keep it fresh in the background until `close`. Raises ConfigError."""
        if len(self._content) > self._settings.file_bytes_max:
            raise ConfigError(
                f"discovery: this worker's registration has {len(self._content)} bytes, where"
                f" {self._settings.file_bytes_max} may be: shorten --served-model-name or --instance-id"
            )
        try:
            await self._try(self._write)
        except TimeoutError as error:
            self._fail(error)
        except OSError as error:
            raise ConfigError(
                f"discovery: cannot write to {self._path.parent}: {error.strerror}"
            ) from error
        self._refresher = asyncio.create_task(self._refresh_forever(), name=f"lease {self._path.stem}")

    async def close(self) -> None:
        """Remove the file, in at most `answer_s`. If the directory does not answer, the lease runs out."""
        if self._refresher is None:
            return
        self._refresher.cancel()
        await asyncio.gather(self._refresher, return_exceptions=True)
        self._refresher = None
        try:
            async with asyncio.timeout(self._settings.answer_s):
                await self._caller.idle()
                await self._caller.result(self._remove)
        except OSError as error:
            log.warning(
                "discovery: cannot remove %s, its lease ends in %g s: %s",
                self._path,
                self._settings.lease_s,
                error.strerror or str(error) or f"no answer in {self._settings.answer_s:g} s",
            )

    async def _refresh_forever(self) -> None:
        while True:
            await asyncio.sleep(self._settings.refresh_s)
            try:
                await self._try(self._refresh)
            except OSError as error:
                self._fail(error)
            except Exception:  # a bug must not end the task that keeps this instance registered
                log.exception("discovery: cannot refresh %s", self._path)
                self.trouble = f"cannot refresh {self._path}: an error in this process, see the log"

    async def _try(self, call: Callable[[], bool]) -> None:
        held = await self._caller.result(call)
        self._outage.ended()
        if held:
            self.registered, self.trouble = True, ""
        elif self.trouble != _SUPERSEDED:
            # Or an older incarnation, from a host whose clock is ahead; then its file disappears with its
            # lease.
            self.trouble = _SUPERSEDED
            log.warning("discovery: a newer incarnation took over %s", self._path.name)

    def _fail(self, error: OSError) -> None:
        self.trouble = f"cannot refresh {self._path}: {error.strerror or error}"
        self._outage.began(self.trouble)

    # The methods below run in a thread, since file access may hang.

    def _write(self) -> bool:
        """Write the file by renaming, so that no reader sees a part of it."""
        _make_private(self._path.parent)
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}{_TEMPORARY_SUFFIX}")
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:
            file.write(self._content)
        temporary.replace(self._path)
        return True

    def _refresh(self) -> bool:
        """Refresh the file, or write it again if it was removed. Returns False if a newer incarnation owns
        it."""
        try:
            content = _content_of(self._path, self._settings.file_bytes_max)
        except (FileNotFoundError, _NoRegistration):
            return self._write()
        if content == self._content:
            os.utime(self._path)
        elif _epoch_in(content) > self._epoch:
            return False
        else:
            return self._write()
        return True

    def _remove(self) -> bool:
        try:
            if _content_of(self._path, self._settings.file_bytes_max) == self._content:
                self._path.unlink()
        except (FileNotFoundError, _NoRegistration):
            pass
        return True


_Stamp = tuple[
    int, int, int
]  # inode, mtime in ns, size. The content is read again when one of them changes


class _Seen(msgspec.Struct):
    """What a watcher knows about a file."""

    stamp: _Stamp
    record: _FileContent | None  # None: the file is invalid
    moved_at: float  # when the stamp was first seen, by this process's monotonic clock


class DirectoryScan:
    """Lists a directory repeatedly. Its calls block: run them in a thread, one at a time."""

    def __init__(self, directory: Path, settings: FileDiscoverySettings) -> None:
        self._directory = directory
        self._settings = settings
        self._seen: dict[str, _Seen] = {}
        self._looked_at = time.monotonic()
        self._warned: set[str] = set()  # the problems that were logged and still exist

    def instances(self) -> dict[str, Registration]:
        """The running instances by id. Raises OSError if the directory cannot be read."""
        now = time.monotonic()
        seen = self._list(now)
        if now - self._looked_at > self._settings.lease_s / 2:
            # The directory did not answer, or this process was suspended. The owners may have been unable
            # to refresh their files as well. So the time that passed does not count.
            for entry in seen.values():
                entry.moved_at = now
        self._looked_at = now
        self._seen = {name: entry for name, entry in seen.items() if self._keep(name, entry, now)}
        return {
            entry.record.registration.instance_id: entry.record.registration
            for entry in self._seen.values()
            if entry.record is not None
        }

    def _list(self, now: float) -> dict[str, _Seen]:
        seen = {}
        for entry in self._entries():
            try:
                seen[entry.name] = self._look(entry, now)
            except FileNotFoundError:
                continue  # deregistered between the listing and the look
            except OSError as error:
                if error.errno != errno.ESTALE:  # NFS's error for a file that was removed
                    raise
        return seen

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        count = 0
        _make_private(
            self._directory
        )  # even if it exists: on a frozen file system this call hangs or fails
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
        stamp = _stamp(entry.stat(follow_symlinks=False))
        known = self._seen.get(entry.name)
        if known is not None and known.stamp == stamp:
            return known
        # The lease counts from now on, whatever the mtime is: the file server's clock may differ.
        return _Seen(stamp, self._read(entry), now)

    def _read(self, entry: os.DirEntry[str]) -> _FileContent | None:
        try:
            content = _content_of(Path(entry.path), self._settings.file_bytes_max)
            record = msgspec.json.decode(content, type=_FileContent)
            if entry.name != _file_name(record.registration.instance_id):  # one file for each instance
                raise _NoRegistration("instance_id: it is not what the file is named after")
        except FileNotFoundError:
            raise
        except (
            msgspec.MsgspecError,
            UnicodeDecodeError,
            RecursionError,
            OSError,
            _NoRegistration,
        ) as error:
            self._warn_once(entry.path, f"ignoring {entry.path}: {str(error)[:_SHOWN_CHARS]}")
            return None
        self._warned.discard(entry.path)
        return record

    def _keep(self, name: str, entry: _Seen, now: float) -> bool:
        """Whether the file is kept: its instance is alive, or the file is invalid and so is left alone."""
        record = entry.record
        if record is None:
            return True
        owner_gone = record.pid_space == pid_space() and not _process_exists(record.pid)
        expired = now - entry.moved_at > self._settings.lease_s
        if owner_gone or expired:
            self._remove_stale(self._directory / name, entry.stamp)
            return False
        return True

    def _remove_stale(self, path: Path, stamp: _Stamp) -> None:
        """Remove the file unless it has changed. If it changes at this moment, its owner writes it
        again."""
        try:
            if _stamp(path.lstat()) == stamp:
                path.unlink()
        except OSError:
            return  # already removed, or this process may only read; the instance is dropped in any case

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned and len(self._warned) < self._settings.files_max:
            self._warned.add(key)
            log.warning("discovery: %s", message)


def _file_name(instance_id: str) -> str:
    return quote(instance_id, safe="") + _SUFFIX


class _NoRegistration(Exception):
    """A file with the name of a registration is something else."""


def _content_of(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file. Never waits at a named pipe, and follows no symbolic link.

    Raises OSError, and _NoRegistration for anything but a regular file of at most `max_bytes`.
    """
    if not stat.S_ISREG(path.lstat().st_mode):  # opening a device may have effects
        raise _NoRegistration("not a regular file")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # it was replaced meanwhile
            raise _NoRegistration("not a regular file")
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise _NoRegistration(f"it is larger than {max_bytes} bytes")
    return content


def _stamp(status: os.stat_result) -> _Stamp:
    return status.st_ino, status.st_mtime_ns, status.st_size


def _make_private(directory: Path) -> None:
    """Create the directory and its missing parents with mode 0700. (`Path.mkdir` sets the mode of the last
    one only.)"""
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        return
    except FileNotFoundError:
        _make_private(directory.parent)
        directory.mkdir(mode=0o700, exist_ok=True)


@functools.cache
def pid_space() -> str:
    """Identifies the processes whose pids this process can check: host, boot and pid namespace."""
    return "/".join(
        (socket.gethostname(), _first_line("/proc/sys/kernel/random/boot_id"), _pid_namespace())
    )


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""  # not Linux: only the host's name counts, and after a reboot the lease runs out


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
        return msgspec.json.decode(content, type=_FileContent).registration.epoch
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return -1
