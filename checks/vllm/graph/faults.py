"""vLLM workers killed and frozen, with requests in every phase: each is still answered as if nothing had
happened.

A phase is held still by freezing (SIGSTOP) the vLLM process that would end it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from checks.vllm.graph.conftest import VLLM_START_S, Expected
from checks.vllm.graph.questions import LONG, Answer, Question
from tests.e2e.conftest import Frontend, Graph
from tests.waiting import wait_until

PARTS = ["worker", "core"]  # Penstock's process, and vLLM's beneath it
MANY = 10  # tokens after which an answer is well under way
WITHIN_S = 90.0
ANSWERED_S = 150.0  # for all the long answers, a dead worker's start beside them included


class Stream:
    """One answer, as far as it has come."""

    def __init__(self, frontend: Frontend, question: Question) -> None:
        self.tokens: list[str] = []
        self._text: list[str] = []
        self._chunks: Any = question.ask(frontend.client(), stream=True)

    def follow(self) -> Answer:
        finish_reason = None
        for chunk in self._chunks:
            for choice in chunk.choices:
                self._text.append(choice.text)
                self.tokens += choice.logprobs.tokens if choice.logprobs is not None else []
                finish_reason = choice.finish_reason or finish_reason
        return Answer("".join(self._text), tuple(self.tokens), finish_reason)


class Load:
    """The long questions, all at once; answered rightly when the block ends."""

    def __init__(self, frontend: Frontend, expected: Expected) -> None:
        self._frontend = frontend
        self._expected = [expected.answers[question] for question in LONG]
        self._streams: list[Stream] = []
        self._answers: list[Future[Answer]] = []
        self._pool = ThreadPoolExecutor(len(LONG))

    def __enter__(self) -> Load:
        return self

    def start(self) -> None:
        self._answers = [self._pool.submit(self._ask, question) for question in LONG]

    def _ask(self, question: Question) -> Answer:
        stream = Stream(self._frontend, question)
        self._streams.append(stream)
        return stream.follow()

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        answers = self.wait_for_answers()
        self._pool.shutdown()
        if failed is None:
            assert [differs_at(*both) for both in zip(answers, self._expected, strict=True)] == [
                None
            ] * len(LONG)
            assert answers == self._expected

    def wait_for_answers(self) -> list[Answer]:
        return [answer.result(timeout=ANSWERED_S) for answer in self._answers]

    def wait_for_tokens(self, count: int) -> None:
        """Until every answer has so many."""
        wait_until(
            lambda: [len(stream.tokens) >= count for stream in self._streams] == [True] * len(LONG),
            lambda: str([len(stream.tokens) for stream in self._streams]),
            WITHIN_S,
        )


def differs_at(answer: Answer, expected: Answer) -> int | None:
    """The number of the first token that is another one."""
    pairs = enumerate(zip(answer.tokens, expected.tokens, strict=True))
    return next((number for number, (token, wanted) in pairs if token != wanted), None)


def core_of(worker: int) -> int:
    """vLLM's process beneath a worker."""
    children = [
        int(child)
        for task in Path(f"/proc/{worker}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
    (core,) = (child for child in children if "EngineCor" in Path(f"/proc/{child}/comm").read_text())
    return core


@dataclass(frozen=True)
class Victim:
    """A process to kill."""

    instance_id: str
    worker: int  # the pid of the worker that is lost with it
    pid: int

    def kill(self) -> int:
        os.kill(self.pid, signal.SIGKILL)
        return self.worker


class Workers:
    """The graph's workers, found and hurt."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def pids(self, service: str, part: str = "worker") -> list[int]:
        workers = [replica["pid"] for replica in self._graph.replicas(service)]
        return workers if part == "worker" else [core_of(worker) for worker in workers]

    def victims(self, service: str, part: str = "worker") -> list[Victim]:
        """Those of a service. Looking them up takes as long as an answer: not while one is under way."""
        return [
            Victim(
                replica["instance_id"],
                replica["pid"],
                replica["pid"] if part == "worker" else core_of(replica["pid"]),
            )
            for replica in self._graph.replicas(service)
        ]

    def wait_replaced(self, lost: int) -> None:
        """Until another worker does this one's work, and nothing is left of it."""
        wait_until(lambda: lost not in self.pids(""), within_s=VLLM_START_S)
        wait_until(
            lambda: all(replica["state"] == "ready" for replica in self._graph.replicas()),
            within_s=VLLM_START_S,
        )
        self._graph.wait_healthy(instances=3, timeout_s=VLLM_START_S)
        assert group_of(lost) == []


def busiest(frontend: Frontend, victims: list[Victim]) -> Victim:
    """The one that computes the most answers now: what happens to it happens to some of them."""

    def running(victim: Victim) -> float:
        return frontend.metric("penstock_worker_running", instance=victim.instance_id)

    return max(victims, key=running)


def group_of(leader: int) -> list[str]:
    """The command lines of a process group: a worker's own, and vLLM's that it started."""
    found = subprocess.run(
        ["pgrep", "--pgroup", str(leader), "--list-full"], capture_output=True, text=True
    )
    return found.stdout.splitlines()


@contextlib.contextmanager
def frozen(pids: list[int]) -> Iterator[None]:
    """These processes stand still."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # it was killed meanwhile
                os.kill(pid, signal.SIGCONT)


@pytest.fixture
def workers(pair: Graph, always: Frontend) -> Workers:
    """Three, known to both frontends."""
    pair.wait_healthy(instances=3, timeout_s=VLLM_START_S)
    wait_until(lambda: always.metric("penstock_instance_state", state="ready") == 3, within_s=VLLM_START_S)
    return Workers(pair)


@pytest.mark.parametrize("part", PARTS)
def test_prefill_killed_while_requests_wait_for_it(
    always: Frontend, expected: Expected, workers: Workers, part: str
) -> None:
    sent = always.metric("penstock_decisions_total", path="remote")
    (victim,) = workers.victims("PrefillWorker", part)
    with Load(always, expected) as load, frozen(workers.pids("PrefillWorker", "core")):
        load.start()
        wait_until(
            lambda: always.metric("penstock_decisions_total", path="remote") >= sent + len(LONG),
            within_s=WITHIN_S,
        )
        lost = victim.kill()
    workers.wait_replaced(lost)


@pytest.mark.parametrize("part", PARTS)
def test_prefill_killed_before_its_kv_is_pulled(
    always: Frontend, expected: Expected, workers: Workers, part: str
) -> None:
    """The clients have read its first tokens; the decode workers compute the prompts themselves."""
    (victim,) = workers.victims("PrefillWorker", part)
    with Load(always, expected) as load, frozen(workers.pids("DecodeWorker", "core")):
        load.start()
        load.wait_for_tokens(1)
        lost = victim.kill()
    workers.wait_replaced(lost)


@pytest.mark.parametrize("part", PARTS)
def test_decode_killed_before_it_has_pulled(
    always: Frontend, expected: Expected, workers: Workers, part: str
) -> None:
    victim = workers.victims("DecodeWorker", part)[0]
    with Load(always, expected) as load, frozen(workers.pids("DecodeWorker", "core")):
        load.start()
        load.wait_for_tokens(1)
        lost = victim.kill()
    workers.wait_replaced(lost)


@pytest.mark.parametrize("part", PARTS)
def test_decode_killed_in_the_middle_of_answers(
    always: Frontend, expected: Expected, workers: Workers, part: str
) -> None:
    again = always.metric("penstock_retries_total")
    victims = workers.victims("DecodeWorker", part)
    with Load(always, expected) as load:
        load.start()
        load.wait_for_tokens(MANY)
        lost = busiest(always, victims).kill()
    assert always.metric("penstock_retries_total") > again
    workers.wait_replaced(lost)


def test_frozen_prefill_worker(always: Frontend, expected: Expected, workers: Workers) -> None:
    """It is found out by its silence, and its work is done elsewhere."""
    again = always.metric("penstock_retries_total")
    sent = always.metric("penstock_decisions_total", path="remote")

    def all_left() -> bool:
        """What it got before it was found out."""
        got = always.metric("penstock_decisions_total", path="remote") - sent
        return 0 < got <= always.metric("penstock_retries_total") - again

    with Load(always, expected) as load, frozen(workers.pids("PrefillWorker")):
        load.start()
        wait_until(all_left, within_s=WITHIN_S)


def test_frozen_decode_worker(always: Frontend, expected: Expected, workers: Workers) -> None:
    """The same; and what it says when it wakes up counts no more."""
    victims = workers.victims("DecodeWorker")
    again = always.metric("penstock_retries_total")
    with Load(always, expected) as load:
        load.start()
        load.wait_for_tokens(MANY)
        with frozen([busiest(always, victims).pid]):
            wait_until(lambda: always.metric("penstock_retries_total") > again, within_s=WITHIN_S)


@pytest.mark.parametrize("service", ["PrefillWorker", "DecodeWorker"])
def test_vllm_stands_still(
    always: Frontend, expected: Expected, workers: Workers, service: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its worker lives and talks, so only the steps that it does not take give it away. All is answered
    elsewhere meanwhile, and it is taken back once it goes on."""
    again = always.metric("penstock_retries_total")
    victims = workers.victims(service, "core")

    def quarantined() -> float:
        return always.metric("penstock_instance_state", state="quarantined")

    with Load(always, expected) as load:
        if service == "DecodeWorker":
            load.start()
            load.wait_for_tokens(MANY)
        with frozen([busiest(always, victims).pid]):
            if service == "PrefillWorker":
                load.start()
            began = time.monotonic()
            wait_until(lambda: quarantined() == 1, within_s=WITHIN_S)
            noticed_s = time.monotonic() - began
            load.wait_for_answers()
            answered_s = time.monotonic() - began
        began = time.monotonic()
        wait_until(lambda: quarantined() == 0, within_s=WITHIN_S)
        back_s = time.monotonic() - began
    assert always.metric("penstock_retries_total") > again
    with capsys.disabled():
        print(f"\n{service}: noticed_s={noticed_s:.1f} answered_s={answered_s:.1f} back_s={back_s:.1f}")


@pytest.mark.parametrize("service", ["PrefillWorker", "DecodeWorker"])
def test_vllm_stands_still_for_a_moment(
    always: Frontend, expected: Expected, workers: Workers, service: str
) -> None:
    """Too short to be given up."""
    again = always.metric("penstock_retries_total")
    with Load(always, expected) as load, frozen(workers.pids(service, "core")):
        load.start()
        time.sleep(0.5)
    assert always.metric("penstock_retries_total") == again
