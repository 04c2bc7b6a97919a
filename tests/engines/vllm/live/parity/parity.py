"""The same requests to `vllm serve` and to Penstock, in front of the same model: the answers must be equal.

First `vllm serve` answers them all; then Penstock does, with one aggregated worker, and with a prefill and
a decode worker through which every prompt goes.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.e2e.conftest import Graph, free_port, running
from tests.engines.vllm.live.conftest import GRAPH, cpu_environment
from tests.engines.vllm.live.parity.answers import Answer, ask
from tests.engines.vllm.live.parity.corpus import CORPUS, MODEL
from tests.engines.vllm.live.parity.models import with_tools
from tests.engines.vllm.live.running import ENGINE_ARGS

PARSERS = ("--tool-call-parser", "hermes", "--reasoning-parser", "qwen3")
LIMITS = ("--block-size", "32", "--kv-cache-memory-bytes", str(64 << 20))
START_S = 120.0
REQUEST_S = 60.0


def _of_whole(answers: dict[bool, Answer]) -> dict[bool, Answer]:
    """The stream's count of reasoning tokens is the whole answer's."""
    counts = answers[False]["usage"]["reasoning_tokens"]
    usage = answers[True]["usage"] | {"reasoning_tokens": counts}
    return {False: answers[False], True: answers[True] | {"usage": usage}}


# Where Penstock means to differ: what is made of vLLM's answers, streamed or not, before they are compared.
EXPLAINED: dict[str, Callable[[dict[bool, Answer]], dict[bool, Answer]]] = {
    # vLLM renders whatever role a message has. Penstock refuses roles that OpenAI's API does not have.
    "bad role": lambda answers: {stream: {"status": 400} for stream in answers},
    # vLLM counts one token less in a stream than in the same answer as a whole.
    "reasoning with stop": _of_whole,
}

Answers = dict[tuple[str, bool], Answer]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tools(tmp_path_factory.mktemp("parity") / "model")


@pytest.fixture(scope="module")
def expected(model: Path) -> Answers:
    """What `vllm serve` says to all of it."""
    with vllm_serve(model) as server:
        answers = {
            (name, stream): ask(server, *request, stream=stream)
            for name, request in CORPUS.items()
            for stream in (False, True)
        }
    for name, explain in EXPLAINED.items():
        both = explain({stream: answers[name, stream] for stream in (False, True)})
        answers.update({(name, stream): answer for stream, answer in both.items()})
    return answers


@pytest.fixture(scope="module", params=["aggregated", "disaggregated"])
def penstock(
    request: pytest.FixtureRequest, expected: Answers, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp(request.param)
    file = folder / "graph.yaml"
    roles = ["aggregated"] if request.param == "aggregated" else ["prefill", "decode"]
    file.write_text(yaml.safe_dump(graph_of(model, roles)))
    with running(file, folder / "state", instances=len(roles)) as graph, client_of(graph) as client:
        yield client
        if request.param == "disaggregated":
            assert graph.metric("penstock_transferred_blocks_total") > len(CORPUS)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", CORPUS)
def test_answers_are_equal(penstock: httpx.Client, expected: Answers, name: str, stream: bool) -> None:
    assert ask(penstock, *CORPUS[name], stream=stream) == expected[name, stream]


# --- the servers ------------------------------------------------------------------------------------


@contextlib.contextmanager
def vllm_serve(model: Path) -> Iterator[httpx.Client]:
    """vLLM's own server."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port)]
    command += [*ENGINE_ARGS, *LIMITS, *PARSERS, "--enable-auto-tool-choice"]
    environment = os.environ | cpu_environment() | {"VLLM_TARGET_DEVICE": "cpu", "VLLM_NO_USAGE_STATS": "1"}
    log = model.parent / "vllm-serve.log"
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=REQUEST_S, trust_env=False
        ) as client:
            _wait(client, server, log)
            yield client
    finally:
        server.terminate()
        server.wait(timeout=REQUEST_S)


def _wait(client: httpx.Client, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-4000:]
        with contextlib.suppress(httpx.TransportError):
            if client.get("/health").status_code == 200:
                return
        time.sleep(0.2)
    raise AssertionError(f"vllm serve is not up after {START_S} s: {log.read_text()[-4000:]}")


def graph_of(model: Path, roles: list[str]) -> dict[str, Any]:
    """deploy/vllm-cpu.yaml with other workers."""
    graph = yaml.safe_load(GRAPH.read_text())
    frontend = graph["spec"]["services"]["Frontend"]
    frontend["extraPodSpec"]["mainContainer"]["args"] = ["--disagg", "always"]
    workers = {role: _worker(model, role) for role in roles}
    graph["spec"]["services"] = {"Frontend": frontend, **workers}
    return graph


def _worker(model: Path, role: str) -> dict[str, Any]:
    own = ["--role", role, "--engine", "vllm", "--model", str(model), "--served-model-name", MODEL]
    args = [*own, "--", *ENGINE_ARGS, *LIMITS, *PARSERS]
    main = {"command": ["penstock", "worker"], "args": args}
    return {"componentType": "worker", "replicas": 1, "extraPodSpec": {"mainContainer": main}}


@contextlib.contextmanager
def client_of(graph: Graph) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=graph.url, timeout=REQUEST_S, trust_env=False) as client:
        yield client
