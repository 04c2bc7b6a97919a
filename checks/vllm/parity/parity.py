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
from checks.vllm.parity.other_answers import OTHER_PATHS, UNSTREAMED, ask_other
from checks.vllm.parity.other_corpus import OTHERS
from tests.e2e.conftest import running

REQUESTS = CORPUS | OTHERS
CASES = [  # name and stream
    (name, stream)
    for name, (path, _) in REQUESTS.items()
    for stream in ([False] if path in UNSTREAMED else [False, True])
]
PARSERS = ("--tool-call-parser", "hermes", "--reasoning-parser", "qwen3")
REQUEST_S = 60.0

Explanation = Callable[[dict[bool, Answer]], dict[bool, Answer]]
"""Takes a request's answers by whether they were streamed, and returns what Penstock's should be."""


def _of_whole(answers: dict[bool, Answer]) -> dict[bool, Answer]:
    """The stream's count of reasoning tokens is the whole answer's."""
    counts = answers[False]["usage"]["reasoning_tokens"]
    usage = answers[True]["usage"] | {"reasoning_tokens": counts}
    return {False: answers[False], True: answers[True] | {"usage": usage}}


def _calls_as_streamed(no_text: str | None) -> Explanation:
    """The calls are the stream's, the end is the whole answer's; `no_text`: the content of a whole one."""

    def explain(answers: dict[bool, Answer]) -> dict[bool, Answer]:
        whole, streamed = answers[False]["choices"], answers[True]["choices"]
        calls = {
            index: choice | {"content": no_text, "tool_calls": streamed[index]["tool_calls"]}
            for index, choice in whole.items()
        }
        ends = {
            index: choice | {"finish_reason": whole[index]["finish_reason"]}
            for index, choice in streamed.items()
        }
        return {False: answers[False] | {"choices": calls}, True: answers[True] | {"choices": ends}}

    return explain


def _ended_by_any_end_token(answers: dict[bool, Answer]) -> dict[bool, Answer]:
    return {
        stream: answer
        | {"choices": {index: it | {"stop_reason": None} for index, it in answer["choices"].items()}}
        for stream, answer in answers.items()
    }


# Where Penstock means to differ: what is made of vLLM's answers, streamed or not, before they are compared.
EXPLAINED: dict[str, Explanation] = {
    # vLLM renders whatever role a message has. Penstock refuses roles that OpenAI's API does not have.
    "bad role": lambda answers: {stream: {"status": 400} for stream in answers},
    # vLLM leaves a call that was cut in the text of a whole answer, or out. A stream has its beginning.
    "tools, a call cut": _calls_as_streamed(None),
    "required, cut": _calls_as_streamed(""),
    # vLLM 0.30 also says `tool_calls` at the end of such a stream.
    "required after reasoning": _calls_as_streamed(""),
    # vLLM ignores it in a stream, where it refuses larger numbers. Penstock refuses all of them.
    "prompt_logprobs, none but the prompt's": lambda answers: answers | {True: {"status": 400}},
    # vLLM counts one token less in a stream than in the same answer as a whole.
    "reasoning with stop": _of_whole,
    # It ends with an end token that is not the tokenizer's own, which vLLM says as the stop_reason.
    "thinking_token_budget of 0": _ended_by_any_end_token,
    # OpenAI refuses it with 400, and so does Penstock.
    "response, unknown previous": lambda answers: {stream: {"status": 400} for stream in answers},
    # vLLM leaves out what its vocabulary does not have. Penstock refuses it, as in a prompt.
    "detokenize, foreign token": lambda answers: {stream: {"status": 400} for stream in answers},
}

Answers = dict[tuple[str, bool], Answer]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tools(tmp_path_factory.mktemp("parity") / "model")


@pytest.fixture(scope="module")
def asked(request: pytest.FixtureRequest) -> set[str]:
    """The requests of the selected tests: all of them, or those that `-k` names."""
    items = (item for item in request.session.items if isinstance(item, pytest.Function))
    return {item.callspec.params["name"] for item in items if "name" in item.fixturenames}


@pytest.fixture(scope="module")
def expected(model: Path, asked: set[str]) -> Answers:
    """What `vllm serve` says to them."""
    log = model.parent / "vllm-serve.log"
    with (
        vllm_serve(model, MODEL, log, *PARSERS, "--enable-auto-tool-choice") as (url, _),
        client_of(url) as server,
    ):
        answers = {
            (name, stream): answer_to(server, name, stream) for name, stream in CASES if name in asked
        }
    for name in asked & EXPLAINED.keys():
        explain = EXPLAINED[name]
        both = explain({stream: answer for (of, stream), answer in answers.items() if of == name})
        answers.update({(name, stream): answer for stream, answer in both.items()})
    return answers


@pytest.fixture(scope="module", params=["aggregated", "disaggregated"])
def penstock(
    request: pytest.FixtureRequest,
    asked: set[str],
    expected: Answers,
    model: Path,
    tmp_path_factory: pytest.TempPathFactory,
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
            assert graph.metric("penstock_transferred_blocks_total") > len(asked & CORPUS.keys())


@pytest.mark.parametrize(("name", "stream"), CASES)
def test_answers_are_equal(penstock: httpx.Client, expected: Answers, name: str, stream: bool) -> None:
    assert answer_to(penstock, name, stream) == expected[name, stream]


def answer_to(server: httpx.Client, name: str, stream: bool) -> Answer:
    path, body = REQUESTS[name]
    asked = ask_other if path in OTHER_PATHS else ask
    return asked(server, path, body, stream=stream)


def client_of(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=REQUEST_S, trust_env=False)
