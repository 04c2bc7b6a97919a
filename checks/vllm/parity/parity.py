"""The same requests to `vllm serve` and to Penstock, in front of the same model: the answers must be equal.

First `vllm serve` answers them all; then Penstock does, with one aggregated worker, and with a prefill and
a decode worker through which every prompt goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from checks.vllm.engine.servers import START_S, graph_of, vllm_serve
from checks.vllm.parity.answers import Answer, ask
from checks.vllm.parity.corpus import CORPUS, MODEL
from checks.vllm.parity.models import with_tools
from tests.e2e.conftest import running

PARSERS = ("--tool-call-parser", "hermes", "--reasoning-parser", "qwen3")
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
    log = model.parent / "vllm-serve.log"
    with (
        vllm_serve(model, MODEL, log, *PARSERS, "--enable-auto-tool-choice") as (url, _),
        client_of(url) as server,
    ):
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
    file.write_text(yaml.safe_dump(graph_of(model, MODEL, roles, *PARSERS)))
    with (
        running(file, folder / "state", instances=len(roles), start_s=START_S) as graph,
        client_of(graph.url) as client,
    ):
        yield client
        assert "Traceback" not in "".join(log.read_text() for log in (folder / "state").rglob("*.log"))
        if request.param == "disaggregated":
            assert graph.metric("penstock_transferred_blocks_total") > len(CORPUS)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", CORPUS)
def test_answers_are_equal(penstock: httpx.Client, expected: Answers, name: str, stream: bool) -> None:
    assert ask(penstock, *CORPUS[name], stream=stream) == expected[name, stream]


def client_of(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=REQUEST_S, trust_env=False)
