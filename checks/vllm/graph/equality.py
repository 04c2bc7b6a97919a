"""Two vLLM workers answer as one does, token by token."""

from __future__ import annotations

import concurrent.futures

import pytest

from checks.vllm.graph.conftest import Expected, ask_choices
from checks.vllm.graph.questions import BOUNDARIES, SHARING, Question
from tests.e2e.conftest import MODEL, Frontend, Graph


@pytest.mark.parametrize("question", BOUNDARIES.values(), ids=BOUNDARIES)
def test_equal_at_block_boundaries(always: Frontend, expected: Expected, question: Question) -> None:
    prefilled = always.metric("penstock_attempts_total", role="prefill", outcome="prefilled")
    assert question.answer(always.client()) == expected.answers[question]
    assert always.metric("penstock_attempts_total", role="prefill", outcome="prefilled") == prefilled + 1


def test_equal_with_prefix_hits_and_concurrency(always: Frontend, expected: Expected) -> None:
    """Twelve at once, twice: the second time, much of every prompt is cached on either side."""
    before = always.metric("penstock_transferred_blocks_total")
    moved = []
    for _ in range(2):
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda question: question.answer(always.client()), SHARING))
        assert answers == [expected.answers[question] for question in SHARING]
        moved.append(always.metric("penstock_transferred_blocks_total") - before - sum(moved))
    assert moved[0] > moved[1] > 0


def test_n_choices_and_stop(always: Frontend, expected: Expected) -> None:
    choices = ask_choices(always)
    assert choices == expected.choices
    assert len(set(choices)) > 1


def test_min_tokens(always: Frontend) -> None:
    """EOS is out of the question until then: the model would end this answer after 14 tokens."""
    client = always.client()

    def tokens(minimum: int) -> int:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=[
                {"role": "user", "content": "My name is Alice."},
                {"role": "assistant", "content": "Hello Alice! Nice to meet you."},
                {"role": "user", "content": "What is my name?"},
            ],
            max_tokens=40,
            temperature=0,
            extra_body={"min_tokens": minimum},
        )
        assert answer.usage is not None
        return answer.usage.completion_tokens

    assert tokens(0) == 14
    assert 25 <= tokens(25) <= 40


def test_unseeded_answers_differ(always: Frontend) -> None:
    """Two of them are the same once in 25 times (the model knows three sentences that begin so), which by
    chance leaves fewer than three kinds among twelve once in a million."""
    client = always.client()
    texts = {
        client.completions.create(
            model=MODEL, prompt="The", max_tokens=16, temperature=1.5, extra_body={"ignore_eos": True}
        )
        .choices[0]
        .text
        for _ in range(12)
    }
    assert len(texts) >= 3


def test_logprobs_are_those_of_one_worker(always: Frontend, graph: Graph) -> None:
    """The first token's come from the prefill worker, the others' from the decode worker."""
    question = BOUNDARIES["65-greedy"]
    logprobs = [
        question.ask(frontend.client()).choices[0].logprobs.token_logprobs for frontend in (always, graph)
    ]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-3)
