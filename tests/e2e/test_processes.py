"""Plain `penstock worker` and `penstock frontend` processes on networks, folders and clocks as they are."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.conftest import ANSWER_S, ROOT, START_S, Process
from tests.ports import free_port
from tests.proxy import Proxy
from tests.waiting import wait_until

SHIFTED = """
import time
now = time.time
time.time = lambda: now() + 3600
from penstock.cli import main
main()
"""
SIM = ("worker", "--engine", "sim", "--model", "sim")


class Shifted(Process):
    """A process whose clock is an hour ahead of the others', and of their folder's."""

    def program(self) -> list[str]:
        return [sys.executable, "-c", SHIFTED]


class Site:
    """A discovery folder and the processes that meet there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.directory = folder / "discovery" / "default"
        self.processes: list[Process] = []

    def start(self, name: str, *arguments: str, kind: type[Process] = Process) -> Process:
        named = ("--instance-id", name) if arguments[0] == "worker" else ()
        discovery = f"file:{self.directory.parent}"
        self.processes.append(kind(self.folder, discovery, name, *arguments, *named))
        return self.processes[-1]

    def warnings(self) -> list[str]:
        return [
            line
            for process in self.processes
            for line in process.log.read_text().splitlines()
            if " WARNING " in line or " ERROR " in line
        ]

    def wait(self, holds: Callable[[], object], what: str, within_s: float = START_S) -> None:
        wait_until(holds, lambda: f"{what}\n{self.logs()}", within_s, look_s=0.05)

    def logs(self) -> str:
        return "\n".join(f"--- {it.name}\n{it.log.read_text()[-3000:]}" for it in self.processes)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    it = Site(tmp_path)
    try:
        yield it
    finally:
        for process in it.processes:
            process.close()
            if process.process.poll() is None:
                process.process.kill()
            process.process.wait()


def test_a_frontend_whose_clock_is_an_hour_ahead_serves_its_neighbours(site: Site) -> None:
    site.start("w-0", *SIM)
    frontend = site.start("f-0", "frontend", kind=Shifted)
    site.wait(lambda: frontend.ready_workers() == 1, "the worker was not found")
    inode = (site.directory / "w-0.json").stat().st_ino
    time.sleep(6.0)  # longer than a lease
    assert frontend.ready_workers() == 1
    assert (site.directory / "w-0.json").stat().st_ino == inode, "it was removed and written again"


def test_a_pipe_in_the_discovery_folder_is_passed_over(site: Site) -> None:
    site.directory.mkdir(parents=True)
    os.mkfifo(site.directory / "x.json")
    site.start("w-0", *SIM)
    frontend = site.start("f-0", "frontend")
    site.wait(lambda: frontend.ready_workers() == 1, "the worker was not found")
    assert frontend.health()[1]["discovery"] == "ok"
    site.wait(site.warnings, "it is not told of")
    (line,) = site.warnings()
    assert "x.json: not a regular file" in line


def test_workers_that_leave_in_order_are_no_warning_and_the_next_request_hears_so_at_once(
    site: Site,
) -> None:
    workers = [site.start(f"w-{number}", *SIM) for number in range(2)]
    frontend = site.start("f-0", "frontend", "--deadlines", "queue=600")
    site.wait(lambda: frontend.ready_workers() == 2, "the workers were not found")
    client = frontend.client()
    assert client.completions.create(model="sim", prompt="Hi", max_tokens=2).choices
    for worker in workers:
        worker.stop()
        site.wait(lambda worker=worker: worker.process.poll() is not None, "it did not leave")
        assert worker.process.returncode == 0
    site.wait(lambda: frontend.instances() == [], "they were not forgotten")
    with pytest.raises(openai.InternalServerError) as refused:
        client.completions.create(model="sim", prompt="Hi", max_tokens=2, timeout=ANSWER_S)
    assert (refused.value.status_code, refused.value.code) == (503, "no_worker")
    assert site.warnings() == []


def test_a_worker_whose_model_folder_hangs_leaves_on_sigterm(site: Site) -> None:
    model = site.folder / "model"
    model.mkdir()
    for file in (ROOT / "models" / "tiny").iterdir():
        (model / file.name).symlink_to(file)
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")  # its reader waits, as on a mount whose server is gone
    worker = site.start("w-0", "worker", "--model", str(model))
    site.wait(lambda: worker.health()[1].get("status") == "starting", "its probes do not answer")
    time.sleep(1.0)
    worker.stop()
    site.wait(lambda: worker.process.poll() is not None, "it did not leave")
    assert worker.process.returncode == 0


@contextlib.contextmanager
def mapped(*targets: int) -> Iterator[list[Proxy]]:
    """Other ports of loopback that lead to these, as a container's published ports do."""
    loop = asyncio.new_event_loop()
    mapping = threading.Thread(target=loop.run_forever)
    mapping.start()
    proxies = [Proxy(("127.0.0.1", 0), ("127.0.0.1", target)) for target in targets]
    try:
        for proxy in proxies:
            asyncio.run_coroutine_threadsafe(proxy.start(), loop).result(ANSWER_S)
        yield proxies
    finally:
        for proxy in proxies:
            asyncio.run_coroutine_threadsafe(proxy.stop(), loop).result(ANSWER_S)
        loop.call_soon_threadsafe(loop.stop)
        mapping.join()
        loop.close()


def test_workers_behind_a_port_mapping_are_reached_by_the_ports_that_they_advertise(site: Site) -> None:
    listening = {(role, kind): free_port() for role in ("prefill", "decode") for kind in ("", "kv-")}
    with mapped(*listening.values()) as proxies:
        reached = dict(zip(listening, proxies, strict=True))
        for role in ("prefill", "decode"):
            arguments = ["worker", "--role", role, "--model", str(ROOT / "models" / "tiny")]
            for kind in ("", "kv-"):
                arguments += [f"--{kind}port", str(listening[role, kind])]
                arguments += [f"--{kind}advertise-port", str(reached[role, kind].port)]
            site.start(role, *arguments)
        frontend = site.start("f-0", "frontend", "--disagg", "always", "--expect", "prefill,decode")
        site.wait(lambda: frontend.ready_workers() == 2, "the workers were not found")
        addresses = {it["instance_id"]: it["address"] for it in frontend.health()[1]["instances"]}
        assert addresses == {role: f"127.0.0.1:{reached[role, ''].port}" for role in ("prefill", "decode")}
        assert not reached["prefill", "kv-"].connected
        prompt = "The harbour was quiet. " * 10
        assert frontend.client().completions.create(model="tiny", prompt=prompt, max_tokens=4).choices
        assert frontend.metric("penstock_transferred_blocks_total") > 0
        assert reached["prefill", "kv-"].connected
