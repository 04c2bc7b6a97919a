"""Graphs of vLLM workers on the CPU: deploy/vllm-cpu.yaml, and one worker alone."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from checks.vllm.graph.questions import PAIR, STRUCTURED, Answer, Question, everything
from tests.e2e.conftest import MODEL, ROOT, START_S, Frontend, Graph, running

SHIPPED = ROOT / "deploy" / "vllm-cpu.yaml"
VLLM_START_S = 300.0  # 25 s for two on two idle cores

CHOICES: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Explain disaggregated serving benefits"}],
    "n": 6,
    "seed": 11,
    "temperature": 1.5,  # the model is so sure of itself that it mostly says the same below that
    "max_tokens": 60,
    "stop": ["decode", "."],
}


class Expected:
    """One aggregated worker's answers."""

    def __init__(self, graph: Graph) -> None:
        questions = everything()
        with ThreadPoolExecutor(6) as pool:
            answers = pool.map(lambda question: question.answer(graph.client()), questions)
            self.answers: dict[Question, Answer] = dict(zip(questions, answers, strict=True))
        for question in questions:
            if question.sampling in STRUCTURED:
                assert re.fullmatch(f"({PAIR})+[0-9a-f]{{,2}}", self.answers[question].text)
        self.choices = ask_choices(graph)


def ask_choices(frontend: Frontend) -> list[tuple[str | None, str]]:
    answer = frontend.client().chat.completions.create(model=MODEL, **CHOICES)
    return [(choice.message.content, choice.finish_reason) for choice in answer.choices]


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """Asked, and stopped, before anything else runs: a small machine has not room for many engines."""
    folder = tmp_path_factory.mktemp("aggregated")
    manifest = yaml.safe_load(SHIPPED.read_text())
    services = manifest["spec"]["services"]
    del services["PrefillWorker"]
    worker = services["DecodeWorker"]["extraPodSpec"]["mainContainer"]
    worker["args"] = ["aggregated" if word == "decode" else word for word in worker["args"]]
    file = folder / "aggregated.yaml"
    file.write_text(yaml.safe_dump(manifest))
    with running(file, folder / "state", instances=1, start_s=VLLM_START_S) as graph:
        return Expected(graph)


@pytest.fixture(scope="session")
def graph(expected: Expected, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graph]:
    """As shipped: 1 frontend, 1 prefill and 1 decode worker."""
    state = tmp_path_factory.mktemp("vllm") / "state"
    with running(SHIPPED, state, instances=2, start_s=VLLM_START_S) as graph:
        yield graph


@pytest.fixture(scope="session")
def pair(graph: Graph) -> Graph:
    """The same with a second decode worker, for whatever needs a choice."""
    assert graph.command("scale", "DecodeWorker=2").returncode == 0
    graph.wait_healthy(instances=3, timeout_s=VLLM_START_S)
    return graph


@pytest.fixture(scope="session")
def always(graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Frontend]:
    """Another frontend of the same graph, which sends every prompt to a prefill worker first."""
    with _another_frontend(graph, "always", tmp_path_factory.mktemp("always")) as frontend:
        yield frontend


@pytest.fixture(scope="session")
def never(graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Frontend]:
    """Another one, which leaves every prompt to the decode workers."""
    with _another_frontend(graph, "never", tmp_path_factory.mktemp("never")) as frontend:
        yield frontend


@contextlib.contextmanager
def _another_frontend(graph: Graph, disagg: str, logs: Path) -> Iterator[Frontend]:
    log = logs / "frontend.log"
    frontend = Frontend()
    folder = graph.state / "vllm-cpu"
    options = {
        "--disagg": disagg,
        "--expect": "prefill,decode",
        "--http-port": str(frontend.port),
        "--namespace": "vllm-cpu",
        "--discovery": f"file:{folder / 'discovery'}",
        "--link-secret-file": str(folder / "secret"),
    }
    words = [word for option in options.items() for word in option]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "penstock", "frontend", *words],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=graph.env,
            cwd=ROOT,
        )
    try:
        _wait_healthy(frontend, process, log)
        yield frontend
    finally:
        frontend.close()
        process.terminate()
        code = process.wait(timeout=40)
    assert code == 0, log.read_text()[-4000:]


def _wait_healthy(frontend: Frontend, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-4000:]
        with contextlib.suppress(OSError):
            if frontend.get("/health")[0] == 200:
                return
        time.sleep(0.1)
    raise AssertionError(f"not healthy in {START_S} s:\n{log.read_text()[-4000:]}")
