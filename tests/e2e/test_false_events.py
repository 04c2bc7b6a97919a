"""Cache events off on one worker, another block size than it says on a second one, while clients chat: both
are named within a minute, every request is served, and what they tell counts again once it is right. Real
processes with the sim engine."""

from __future__ import annotations

import itertools
import signal
import threading
import time

import openai

from tests.e2e.conftest import MODEL, Deployment
from tests.waiting import wait_until

MINUTE_S = 60.0
CLIENTS = 16
TURNS = 8
NEW_CHARS = 400  # a token each
OUTPUT_TOKENS = 32
PACE = ("--sim-cost-model", "qwen3-8b/h200/tp1")  # about three requests on each worker at a time


class Chats:
    """Threads whose conversations grow by so many characters a turn, and begin anew after some."""

    def __init__(self, deployment: Deployment, clients: int = CLIENTS, new_chars: int = NEW_CHARS) -> None:
        self.answers = 0
        self.errors: list[Exception] = []
        self._new_chars = new_chars
        self._numbers = itertools.count()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(deployment.client(),)) for _ in range(clients)
        ]

    def __enter__(self) -> Chats:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * MINUTE_S)

    def _run(self, client: openai.OpenAI) -> None:
        while not self._stop.is_set():
            text = ""
            for _ in range(TURNS):
                text += f"{next(self._numbers):>{self._new_chars}}"
                try:
                    answer = client.completions.create(model=MODEL, prompt=text, max_tokens=OUTPUT_TOKENS)
                except openai.OpenAIError as error:
                    self.errors.append(error)
                    break
                text += answer.choices[0].text
                self.answers += 1
                if self._stop.wait(0.2):
                    break


def start(deployment: Deployment, name: str, *options: str, fault: str = "off", claimed: int = 0) -> None:
    options = ("--role", "aggregated", "--engine", "sim", *PACE, *options)
    served = ("--model", MODEL, "--instance-id", name)
    module = "tests.e2e.false_events_worker"
    deployment.start(name, fault, str(claimed), "worker", *options, *served, module=module)


def wait_until_distrusted(deployment: Deployment, **labels: str) -> None:
    def named() -> bool:
        return deployment.metric("penstock_worker_distrusted", **labels) == 1

    wait_until(named, f"distrusted: {labels}", MINUTE_S, look_s=0.2)


def test_false_events_under_load_are_named_served_and_believed_again(deployment: Deployment) -> None:
    for name in ("w0", "w1"):
        start(deployment, name)
    start(deployment, "w2", "--block-size", "32", claimed=16)
    deployment.wait_for(w0="ready", w1="ready", w2="ready")
    with Chats(deployment) as chats:
        wait_until_distrusted(deployment, instance="w2", cause="block_size")
        assert deployment.metric("penstock_worker_distrusted") == 1, "of the others nothing is wrong"
        deployment.signal("w1", signal.SIGUSR1)
        wait_until_distrusted(deployment, instance="w1", cause="events_off")
        time.sleep(5.0)
        deployment.signal("w1", signal.SIGUSR1)
        deployment.end("w2", signal.SIGTERM)
        start(deployment, "w2")
        deployment.wait_for(w0="ready", w1="ready", w2="ready")

        def believed() -> bool:
            return deployment.metric("penstock_worker_distrusted") == 0

        wait_until(believed, "all are trusted", MINUTE_S, look_s=0.2)
        answers = chats.answers
        wait_until(lambda: chats.answers > answers + 100, "it goes on", MINUTE_S, look_s=0.2)
    assert chats.errors == []
    log = (deployment.folder / "frontend.log").read_text()
    assert "kv overlap check: w1: distrusted, events_off: no cache events come from it" in log
    assert "w2: distrusted, block_size: its cache events are of blocks of another size than it said" in log
    assert "kv overlap check: w1: trusted again" in log
