"""Scaling and dying under load: no request is lost."""

from __future__ import annotations

import collections
import concurrent.futures
import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.conftest import ANSWER_S, MODEL, ROOT, START_S, Graph, running
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graph]:
    """A graph that may be hurt."""
    state: Path = tmp_path_factory.mktemp("scaling") / "state"
    with running(ROOT / "deploy" / "local.yaml", state, instances=4) as graph:
        yield graph


class Load:
    """Eight clients that ask for Alice's name until told to stop."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.stop = threading.Event()
        self.answers: list[str | None] = []
        self.errors: list[str] = []

    def __enter__(self) -> Load:
        self.pool = concurrent.futures.ThreadPoolExecutor(8)
        self.clients = [self.pool.submit(self.ask, number) for number in range(8)]
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for client in self.clients:
            client.result(timeout=2 * ANSWER_S)
        self.pool.shutdown()

    def ask(self, number: int) -> None:
        client = self.graph.client()
        turn = 0
        while not self.stop.is_set():
            turn += 1
            try:
                answer = client.chat.completions.create(
                    model=MODEL,
                    messages=[
                        {"role": "user", "content": "My name is Alice."},
                        {"role": "assistant", "content": "Hello Alice! Nice to meet you."},
                        {"role": "user", "content": "What is my name?"},
                    ],
                    max_tokens=50,
                    temperature=0,
                    extra_body={"cache_salt": f"{number} {turn}"},
                )
                self.answers.append(answer.choices[0].message.content)
            except openai.OpenAIError as error:  # whatever a client can see is the finding
                self.errors.append(repr(error))

    def wait_for_more(self, count: int = 8) -> None:
        target = len(self.answers) + count
        wait_until(lambda: len(self.answers) >= target or self.errors, "more answers", START_S)

    def check(self) -> None:
        assert self.errors == []
        assert set(self.answers) == {"Your name is Alice."}


def wait_for_roles(graph: Graph, **wanted: int) -> None:
    """Until so many workers of each role are ready, and no others are there that are about to leave."""

    def holds() -> bool:
        instances = json.loads(graph.get("/health")[1])["instances"]
        ready = collections.Counter(found["role"] for found in instances if found["state"] == "ready")
        return ready == wanted and len(graph.replicas()) == 1 + len(instances) == 1 + ready.total()

    wait_until(holds, f"{wanted} workers", START_S, look_s=0.1)


def test_scaling_under_load(graph: Graph) -> None:
    with Load(graph) as load:
        load.wait_for_more()
        assert graph.command("scale", "PrefillWorker=3", "DecodeWorker=1").returncode == 0
        wait_for_roles(graph, prefill=3, decode=1)
        load.wait_for_more()
        assert graph.command("scale", "PrefillWorker=2", "DecodeWorker=2").returncode == 0
        wait_for_roles(graph, prefill=2, decode=2)
        load.wait_for_more()
    load.check()


def test_a_rolling_restart_of_the_workers_under_load(graph: Graph) -> None:
    wait_for_roles(graph, prefill=2, decode=2)
    before = {replica["pid"] for replica in graph.replicas()}
    with Load(graph) as load:
        load.wait_for_more()
        result = graph.command("restart", "PrefillWorker", "DecodeWorker", timeout_s=300)
        assert result.returncode == 0, result.stderr
        assert len(re.findall(r"^(prefill|decode)-\d+ -> \1-\d+$", result.stdout, re.M)) == 4
        wait_for_roles(graph, prefill=2, decode=2)
        load.wait_for_more()
    load.check()
    after = {replica["pid"] for replica in graph.replicas()}
    assert len(after) == len(before)
    assert len(after & before) == 1  # the frontend


def pids(graph: Graph, service: str) -> list[int]:
    return [replica["pid"] for replica in graph.replicas(service)]


@pytest.mark.parametrize("service", ["PrefillWorker", "DecodeWorker"])
def test_killed_worker_loses_no_request(graph: Graph, service: str) -> None:
    graph.wait_healthy(instances=4)
    with Load(graph) as load:
        load.wait_for_more()
        victim = graph.replicas(service)[0]
        os.kill(victim["pid"], signal.SIGKILL)
        load.wait_for_more()
        wait_until(lambda: victim["pid"] not in pids(graph, service), "its end is noticed", START_S)
        wait_for_roles(graph, prefill=2, decode=2)  # the launcher has started it again
        load.wait_for_more()
    load.check()
    assert len(pids(graph, service)) == 2


def test_frozen_worker_loses_no_request(graph: Graph) -> None:
    graph.wait_healthy(instances=4)
    victim = graph.replicas("DecodeWorker")[0]
    with Load(graph) as load:
        load.wait_for_more()
        os.kill(victim["pid"], signal.SIGSTOP)
        try:
            load.wait_for_more(24)
        finally:
            os.kill(victim["pid"], signal.SIGCONT)
        graph.wait_healthy(instances=4)
    load.check()
