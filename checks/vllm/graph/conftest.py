"""Graphs of vLLM workers on the CPU: deploy/vllm-cpu.yaml, and one worker alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import yaml

from checks.vllm.graph.questions import PAIR, STRUCTURED, Answer, Question, everything
from tests.e2e.conftest import MODEL, ROOT, Frontend, Graph, Process, another_frontend, running

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
def always(graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """Another frontend of the same graph, which sends every prompt to a prefill worker first."""
    with another_frontend(graph.state / "vllm-cpu", tmp_path_factory.mktemp("always"), "always") as found:
        yield found


@pytest.fixture(scope="session")
def never(graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """Another one, which leaves every prompt to the decode workers."""
    with another_frontend(graph.state / "vllm-cpu", tmp_path_factory.mktemp("never"), "never") as found:
        yield found
