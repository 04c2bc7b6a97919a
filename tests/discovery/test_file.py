from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from penstock.discovery.file import FileDiscovery, FileDiscoverySettings
from penstock.errors import ConfigError
from tests.builders import registration
from tests.discovery.contract import DiscoveryContract, Watcher
from tests.waiting import until

FAST = FileDiscoverySettings(lease_s=1.5, poll_s=0.05)
LONG_S = 600.0  # a lease that no test waits for

# Writes its registration, says so, and holds the lease until it is killed.
OWNER = """
import asyncio, sys
from pathlib import Path
from penstock.discovery.file import FileDiscovery, FileDiscoverySettings
from penstock.shapes import Registration, Role

async def main():
    discovery = FileDiscovery(Path(sys.argv[1]), FileDiscoverySettings(lease_s=float(sys.argv[2])))
    await discovery.register(Registration("child-0", 1, Role.DECODE, "tiny", "127.0.0.1:1"))
    print("up", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.fixture
async def open_discovery(tmp_path: Path) -> AsyncIterator[object]:
    opened = []
    leases = []

    class Recording(FileDiscovery):
        async def register(self, registration):
            leases.append(await super().register(registration))
            return leases[-1]

    def open_one(settings: FileDiscoverySettings = FAST) -> FileDiscovery:
        opened.append(Recording(tmp_path / "discovery", settings))
        return opened[-1]

    yield open_one
    for lease in leases:
        await lease.close()
    for discovery in opened:
        await discovery.close()


class TestFileDiscovery(DiscoveryContract):
    pass


def start_owner(directory: Path, lease_s: float) -> subprocess.Popen[str]:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(directory), str(lease_s)], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout.readline() == "up\n"
    return owner


def reap(owner: subprocess.Popen[str]) -> None:
    owner.kill()
    owner.wait()
    owner.stdout.close()


async def test_an_instance_whose_process_is_killed_vanishes_long_before_its_lease(
    tmp_path, open_discovery
) -> None:
    directory = tmp_path / "discovery"
    owner = await asyncio.to_thread(start_owner, directory, LONG_S)
    async with Watcher(open_discovery(FileDiscoverySettings(lease_s=LONG_S, poll_s=0.05))) as watcher:
        try:
            await watcher.until("child-0")
        finally:
            await asyncio.to_thread(reap, owner)
        await watcher.until()
    assert list(directory.iterdir()) == []


async def test_another_machines_instance_lives_by_its_lease_alone(tmp_path, open_discovery) -> None:
    directory = tmp_path / "discovery"
    async with Watcher(open_discovery()) as watcher:
        await watcher.until()
        lease = await open_discovery().register(registration())
        await watcher.until("w-0")
        path = directory / "w-0.json"
        content = json.loads(path.read_bytes())
        await lease.close()
        await watcher.until()
        began = time.monotonic()
        path.write_text(json.dumps(content | {"pid_space": "elsewhere/boot/1", "pid": 2**22 + 1}))
        os.utime(path, (1, 1))  # its clock may be anywhere
        await watcher.until("w-0")
        await watcher.until()
        assert time.monotonic() - began >= FAST.lease_s
        assert not path.exists()


@pytest.mark.parametrize("server_clock", [1, 2**33], ids=["behind", "ahead"])
async def test_a_neighbour_lives_by_its_process_and_lease_whatever_the_clock_of_the_folders_server_says(
    tmp_path, open_discovery, server_clock
) -> None:
    await open_discovery().register(registration())
    path = tmp_path / "discovery" / "w-0.json"
    inode = path.stat().st_ino
    os.utime(path, (server_clock, server_clock))
    async with Watcher(open_discovery()) as watcher:
        await watcher.until("w-0")
        assert path.stat().st_ino == inode, "it was removed and written again"


async def test_a_live_lease_outlasts_its_length(open_discovery) -> None:
    await open_discovery().register(registration())
    async with Watcher(open_discovery()) as watcher:
        await watcher.until("w-0")
        await asyncio.sleep(2.2 * FAST.lease_s)
        assert set(watcher.latest) == {"w-0"}
        assert watcher.updates == 1


async def test_all_come_back_after_the_directory_is_deleted(tmp_path, open_discovery) -> None:
    await open_discovery().register(registration("w-0"))
    await open_discovery().register(registration("w-1"))
    async with Watcher(open_discovery()) as watcher:
        await watcher.until("w-0", "w-1")
        shutil.rmtree(tmp_path / "discovery")
        await watcher.until()
        await watcher.until("w-0", "w-1")


async def test_an_outage_keeps_the_last_set(tmp_path, open_discovery, caplog) -> None:
    directory = tmp_path / "discovery"
    lease = await open_discovery().register(registration())
    async with Watcher(watching := open_discovery()) as watcher:
        await watcher.until("w-0")
        shutil.rmtree(directory)
        directory.write_text("a file where the directory was")
        await until(lambda: "cannot read" in watching.trouble and "cannot refresh" in lease.trouble)
        await asyncio.sleep(FAST.lease_s)
        assert set(watcher.latest) == {"w-0"}
        directory.unlink()
        await until(lambda: watching.trouble == lease.trouble == "")
        await watcher.until("w-0")  # the directory is empty until it has written its file again
        await lease.close()
        await watcher.until()
    assert sum("cannot read" in record.message for record in caplog.records) == 1


LIES: dict[str, dict[str, dict[str, object]]] = {
    "another.json": {},  # the instance would be there twice
    "w%2F1.json": {"registration": {"instance_id": "w/1", "epoch": -1}},
    "long.json": {"registration": {"instance_id": "x" * 300}},
    "lines.json": {"registration": {"instance_id": "lines", "model": "a\nb"}},
    "boss.json": {"registration": {"instance_id": "boss", "role": "boss" * 1000}},
    "far.json": {"registration": {"instance_id": "far", "address": "h" * 1000}},
    "group.json": {"registration": {"instance_id": "group"}, "file": {"pid": -1}},
}


async def test_garbage_is_named_once_and_ignored(tmp_path, open_discovery, caplog) -> None:
    directory = tmp_path / "discovery"
    directory.mkdir()
    (directory / "half.json").write_text('{"registration": {"instance_id"')
    (directory / "deep.json").write_text(2000 * '{"a":' + "1" + 2000 * "}")
    (directory / "binary.json").write_bytes(b"\xff\xfe\x00")
    (directory / "huge.json").write_bytes(b" " * (FAST.file_bytes_max + 1))
    (directory / "folder.json").mkdir()
    os.mkfifo(directory / "pipe.json")  # reading it would never end
    (directory / "README").write_text("not an instance")
    lie = {"instance_id": "w-1", "epoch": 1, "role": "decode", "model": "m", "address": "10.0.0.7:1"}
    for name, change in LIES.items():
        content = {"registration": {**lie, **change.get("registration", {})}, **change.get("file", {})}
        (directory / name).write_text(json.dumps(content))
    await open_discovery().register(registration())
    with caplog.at_level(logging.WARNING):
        async with Watcher(open_discovery()) as watcher:
            await watcher.until("w-0")
            await asyncio.sleep(0.3)
    for name in ("half.json", "deep.json", "binary.json", "huge.json", "folder.json", "pipe.json", *LIES):
        assert sum(name in record.message for record in caplog.records) == 1, name
    assert not any("README" in record.message for record in caplog.records)
    assert (directory / "half.json").exists()


async def test_files_beyond_the_limit_are_ignored(tmp_path, open_discovery, caplog) -> None:
    directory = tmp_path / "discovery"
    few = FileDiscoverySettings(lease_s=1.5, poll_s=0.05, files_max=2)
    for index in range(4):
        await open_discovery().register(registration(f"w-{index}"))
    assert len(list(directory.iterdir())) == 4
    async with Watcher(open_discovery(few)) as watcher:
        assert len(await watcher.until_true(lambda latest: latest is not None)) == 2
    assert sum("ignoring the rest" in record.message for record in caplog.records) == 1


async def test_an_older_incarnation_gives_way(tmp_path, open_discovery, caplog) -> None:
    await open_discovery().register(registration(epoch=1))
    await open_discovery().register(registration(epoch=2))
    await until(lambda: any("took over" in record.message for record in caplog.records))
    assert json.loads((tmp_path / "discovery" / "w-0.json").read_bytes())["registration"]["epoch"] == 2


async def test_the_directory_is_private(tmp_path) -> None:
    deep = tmp_path / "a" / "b"
    lease = await FileDiscovery(deep, FAST).register(registration())
    await lease.close()
    assert deep.stat().st_mode & 0o777 == deep.parent.stat().st_mode & 0o777 == 0o700


async def test_a_directory_that_cannot_be_written_refuses_to_start(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"discovery: cannot write to .*file"):
        await FileDiscovery(tmp_path / "file", FAST).register(registration())


async def test_stale_files_of_this_machine_are_not_even_seen_at_first(tmp_path, open_discovery) -> None:
    directory = tmp_path / "discovery"
    owner = await asyncio.to_thread(start_owner, directory, LONG_S)
    await asyncio.to_thread(reap, owner)
    assert (directory / "child-0.json").exists()
    async with Watcher(open_discovery()) as watcher:
        await watcher.until()
        assert watcher.updates == 1


async def test_an_incarnation_of_a_host_whose_clock_is_behind_takes_over_once_the_other_is_gone(
    tmp_path, open_discovery
) -> None:
    path = tmp_path / "discovery" / "w-0.json"
    lease = await open_discovery().register(registration(epoch=1))
    mine = path.read_bytes()
    others = json.loads(mine) | {"pid_space": "elsewhere/boot/1"}
    others["registration"]["epoch"] = 2
    path.write_text(json.dumps(others))
    await until(lambda: "another incarnation" in lease.trouble)
    assert json.loads(path.read_bytes()) == others
    async with Watcher(open_discovery()) as watcher:  # which removes what nobody touches
        await watcher.until_true(lambda latest: bool(latest) and latest["w-0"].epoch == 1)
    assert path.read_bytes() == mine
    await until(lambda: lease.trouble == "")


async def test_a_registration_too_long_for_a_file_refuses_to_start(open_discovery) -> None:
    with pytest.raises(ConfigError, match="shorten --served-model-name or --instance-id"):
        await open_discovery().register(
            msgspec.structs.replace(registration(), model="m" * FAST.file_bytes_max)
        )


async def test_what_is_no_regular_file_is_named_once_and_never_opened(
    tmp_path, open_discovery, caplog
) -> None:
    directory = tmp_path / "discovery"
    directory.mkdir()
    os.mkfifo(directory / "fifo.json")  # whose open would wait for a writer
    (directory / "dangling.json").symlink_to(tmp_path / "nowhere")
    (directory / "loop.json").symlink_to("loop.json")
    (directory / "device.json").symlink_to("/dev/zero")
    (directory / "folder.json").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "socket.json"))
        await open_discovery().register(registration())
        async with Watcher(open_discovery()) as watcher:
            await watcher.until("w-0")
            await asyncio.sleep(0.3)
    for name in ("fifo", "dangling", "loop", "device", "folder", "socket"):
        (record,) = [it for it in caplog.records if f"{name}.json" in it.message]
        assert record.message.endswith("not a regular file")


async def test_a_lease_replaces_a_pipe_that_stands_in_its_place(tmp_path, open_discovery) -> None:
    lease = await open_discovery().register(registration())
    path = tmp_path / "discovery" / "w-0.json"
    path.unlink()
    os.mkfifo(path)
    async with Watcher(open_discovery()) as watcher:
        await watcher.until("w-0")
    assert path.is_file()
    await until(lambda: lease.trouble == "")


# --- a directory that does not answer -------------------------------------------------------------

IMPATIENT = FileDiscoverySettings(lease_s=3.0, poll_s=0.05, answer_s=1.0)


HANGS_S = 60.0


class DeadServer:
    """Calls of `os` that hang as on a hard mount whose server is gone, until it is back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._answers = threading.Event()
        self._answers.set()
        for name in ("scandir", "mkdir", "utime", "open", "lstat", "unlink", "replace"):
            monkeypatch.setattr(os, name, self._waiting(getattr(os, name)))

    def _waiting(self, call):
        def wait(*args, **kwargs):
            assert self._answers.wait(HANGS_S)
            return call(*args, **kwargs)

        return wait

    def dies(self) -> None:
        self._answers.clear()

    def is_back(self) -> None:
        self._answers.set()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[DeadServer]:
    dead = DeadServer(monkeypatch)
    yield dead
    dead.is_back()


async def test_a_directory_that_hangs_is_an_outage_that_ends_as_if_nothing_had_been(
    open_discovery, server, caplog
) -> None:
    caplog.set_level(logging.INFO)
    lease = await open_discovery(IMPATIENT).register(registration("w-0"))
    async with Watcher(watching := open_discovery(IMPATIENT)) as watcher:
        await watcher.until("w-0")
        server.dies()
        await until(lambda: all("no answer in 1 s" in it.trouble for it in (watching, lease)))
        threads = os.listdir("/proc/self/task")
        await asyncio.sleep(IMPATIENT.lease_s)
        assert len(os.listdir("/proc/self/task")) <= len(threads), "another call hangs beside the first"
        server.is_back()
        await until(lambda: watching.trouble == lease.trouble == "")
        assert set(watcher.latest) == {"w-0"}
        assert watcher.updates == 1, "it was forgotten for a while"
    begun = [record for record in caplog.records if "is not available" in record.message]
    ended = [record for record in caplog.records if "is available again" in record.message]
    assert len(begun) == len(ended) == 2  # one of the watch, one of the lease


async def test_nobody_waits_for_a_directory_that_hangs_when_leaving(open_discovery, server, caplog) -> None:
    lease = await open_discovery(IMPATIENT).register(registration())
    async with Watcher(open_discovery(IMPATIENT)) as watcher:
        await watcher.until("w-0")
        server.dies()
        await until(lambda: "no answer" in lease.trouble)
        async with asyncio.timeout(HANGS_S / 2):
            await lease.close()
    assert any("its lease ends in 3 s: no answer" in record.message for record in caplog.records)


async def test_an_instance_registers_once_the_directory_answers(open_discovery, server) -> None:
    server.dies()
    lease = await open_discovery(IMPATIENT).register(registration())
    assert not lease.registered
    assert "no answer" in lease.trouble
    server.is_back()
    async with Watcher(open_discovery(IMPATIENT)) as watcher:
        await watcher.until("w-0")
    await until(lambda: lease.registered and lease.trouble == "")
