"""Plain `penstock worker` and `penstock frontend` processes that find each other in a real etcd."""

from __future__ import annotations

import concurrent.futures
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from tests.discovery.etcd_server import Etcd, running_etcd
from tests.e2e.conftest import ANSWER_S, START_S, STOP_S, Process
from tests.waiting import wait_until

TOKENS = 60
CLIENTS = 4
NAMESPACE = "shop"


class Shop:
    """Two frontends, and workers."""

    def __init__(self, folder: Path, etcd: Etcd) -> None:
        self.folder, self.etcd = folder, etcd
        self.processes: list[Process] = []
        self.workers = [self.start_worker(f"w-{number}") for number in range(2)]
        self.frontends = [self._start(f"f-{number}", "frontend") for number in range(2)]

    def start_worker(self, name: str) -> Process:
        return self._start(name, "worker", "--engine", "sim", "--model", "sim", "--instance-id", name)

    def _start(self, name: str, *arguments: str) -> Process:
        discovery = self.etcd.endpoint.replace("http://", "etcd://")
        self.processes.append(
            Process(self.folder, discovery, name, *arguments, PENSTOCK_NAMESPACE=NAMESPACE)
        )
        return self.processes[-1]

    def keys(self) -> list[str]:
        """The instances that etcd has."""
        prefix = f"/penstock/{NAMESPACE}/instances/"
        return [
            line.removeprefix(prefix)
            for line in self.etcd.ctl("get", "--prefix", prefix, "--keys-only").split()
        ]

    def wait(self, holds: Callable[[], bool], what: str) -> None:
        def holds_while_all_run() -> bool:
            for process in self.processes:
                assert process.process.poll() is None, f"{process.name}: {process.log.read_text()[-3000:]}"
            return holds()

        wait_until(holds_while_all_run, what, START_S, look_s=0.1)

    def stop(self) -> None:
        for process in self.processes:
            process.stop()
        codes = {process.name: process.process.wait(timeout=STOP_S) for process in self.processes}
        assert set(codes.values()) == {0}, codes

    def kill(self) -> None:
        for process in self.processes:
            process.close()
            process.process.kill()
            process.process.wait()


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    folder = tmp_path_factory.mktemp("shop")
    with running_etcd(folder) as etcd:
        shop = Shop(folder, etcd)
        try:
            yield shop
        finally:
            shop.kill()


class Streams:
    """Clients of both frontends, one stream after the other until told to stop."""

    def __init__(self, shop: Shop) -> None:
        self.shop = shop
        self.ended = threading.Event()
        self.answers: list[tuple[str | None, int]] = []
        self.errors: list[str] = []

    def __enter__(self) -> Streams:
        self.pool = concurrent.futures.ThreadPoolExecutor(CLIENTS)
        self.clients = [self.pool.submit(self.ask, number) for number in range(CLIENTS)]
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        for client in self.clients:
            client.result(timeout=2 * ANSWER_S)
        self.pool.shutdown()

    def ask(self, number: int) -> None:
        client = self.shop.frontends[number % 2].client()
        turn = 0
        while not self.ended.is_set():
            turn += 1
            try:
                stream = client.completions.create(
                    model="sim",
                    prompt=f"{number} {turn}",
                    max_tokens=TOKENS,
                    stream=True,
                    stream_options={"include_usage": True},
                    extra_body={"ignore_eos": True},
                )
                finish, tokens = None, 0
                for chunk in stream:
                    finish = chunk.choices[0].finish_reason if chunk.choices else finish
                    tokens = chunk.usage.completion_tokens if chunk.usage else tokens
                self.answers.append((finish, tokens))
            except openai.OpenAIError as error:  # whatever a client can see is the finding
                self.errors.append(repr(error))

    def wait_for_more(self) -> None:
        target = len(self.answers) + 2 * CLIENTS
        self.shop.wait(lambda: len(self.answers) >= target or bool(self.errors), "no answers")

    def check(self) -> None:
        assert self.errors == []
        assert set(self.answers) == {("length", TOKENS)}
        for frontend in self.shop.frontends:
            assert frontend.metric("penstock_retries_total") == 0  # nothing was even tried twice


def trouble(process: Process) -> str:
    """What it says of discovery; nothing while it does not answer."""
    said: str = process.health()[1].get("discovery", "")
    return said


def test_etcd_freezes_under_load(shop: Shop) -> None:
    frontends, worker = shop.frontends, shop.workers[0]
    shop.wait(lambda: all(frontend.ready_workers() == 2 for frontend in frontends), "workers not found")
    with Streams(shop) as streams:
        streams.wait_for_more()
        shop.etcd.signal(signal.SIGSTOP)
        try:
            shop.wait(lambda: "no answer" in trouble(worker), "the outage is not told of")
            assert worker.health()[0] == 200  # it serves those who know it
            streams.wait_for_more()
        finally:
            shop.etcd.signal(signal.SIGCONT)
        shop.wait(lambda: trouble(worker) == "ok", "not over")
    streams.check()


def test_etcd_dies_and_comes_back_empty_under_load(shop: Shop) -> None:
    frontends, etcd = shop.frontends, shop.etcd
    shop.wait(lambda: all(frontend.ready_workers() == 2 for frontend in frontends), "workers not found")
    with Streams(shop) as streams:
        streams.wait_for_more()
        etcd.kill()
        etcd.lose_data()
        late = shop.start_worker("w-2")
        known = shop.workers[0]
        shop.wait(lambda: trouble(known) not in ("", "ok"), "the outage is not told of")
        assert known.health()[0] == 200  # it serves those who know it
        shop.wait(lambda: frontends[0].metric("penstock_discovery_up") == 0, "a frontend is silent")
        shop.wait(lambda: late.health()[0] == 503 and etcd.endpoint in trouble(late), "silent")
        assert late.health()[1]["status"] == "starting"
        streams.wait_for_more()
        etcd.start()
        shop.wait(lambda: sorted(shop.keys()) == ["w-0", "w-1", "w-2"], "not registered again")
        shop.wait(lambda: all(frontend.ready_workers() == 3 for frontend in frontends), "w-2 is not found")
        shop.wait(lambda: late.health()[0] == known.health()[0] == 200, "not healthy")
        streams.wait_for_more()
    streams.check()
    for frontend in frontends:
        shop.wait(lambda it=frontend: it.metric("penstock_discovery_up") == 1, "a frontend does not see it")
    etcd.kill()
    shop.stop()  # in time, without etcd
