"""Disaggregated output is aggregated output, token by token."""

from __future__ import annotations

import concurrent.futures
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.conftest import MODEL, ROOT, Graph, running

BLOCK = 16
LENGTHS = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 6 * BLOCK - 1, 6 * BLOCK, 6 * BLOCK + 1, 500]
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 0.9, "seed": 1234, "top_p": 0.95},
    "penalties": {
        "temperature": 0.8,
        "seed": 7,
        "presence_penalty": 0.6,
        "frequency_penalty": 0.4,
        "extra_body": {"repetition_penalty": 1.1, "top_k": 40, "min_p": 0.01},
    },
}


def prompt(length: int, seed: int) -> list[int]:
    """Any tokens do: equality needs no sense. Special ones are left out."""
    rng = random.Random(seed)
    return [rng.randrange(300, 900) for _ in range(length)]


def complete(
    client: openai.OpenAI, tokens: list[int], max_tokens: int = 24, **sampling: Any
) -> tuple[Any, ...]:
    extra = {"ignore_eos": True, **sampling.pop("extra_body", {})}
    answer = client.completions.create(
        model=MODEL, prompt=tokens, max_tokens=max_tokens, logprobs=2, extra_body=extra, **sampling
    )
    choice = answer.choices[0]
    assert choice.logprobs is not None
    assert answer.usage is not None
    return choice.text, choice.logprobs.tokens, choice.finish_reason, answer.usage.completion_tokens


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("length", LENGTHS)
def test_equal_at_block_boundaries(
    local_graph: Graph, aggregated_graph: Graph, length: int, sampling: dict[str, Any]
) -> None:
    tokens = prompt(length, seed=length)
    expected = complete(aggregated_graph.client(), tokens, **sampling)
    assert expected[3] == 24
    assert complete(local_graph.client(), tokens, **sampling) == expected


def test_equal_with_prefix_hits_and_concurrency(local_graph: Graph, aggregated_graph: Graph) -> None:
    """Twelve at once, sharing prefixes of several lengths, some of them cached on either side."""
    shared = prompt(200, seed=99)
    prompts = [shared[: 20 * k] + prompt(30, seed=k) for k in range(12)]

    def both(tokens: list[int]) -> bool:
        sampling = {"temperature": 0.7, "seed": 5}
        return complete(local_graph.client(), tokens, **sampling) == complete(
            aggregated_graph.client(), tokens, **sampling
        )

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert all(pool.map(both, prompts))
        assert all(pool.map(both, prompts))  # and again, now that everything is cached


def test_n_choices_and_stop(local_graph: Graph, aggregated_graph: Graph) -> None:
    def ask(graph: Graph) -> list[tuple[str | None, str]]:
        answer = graph.client().chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Explain disaggregated serving benefits"}],
            n=3,
            seed=11,
            temperature=0.8,
            max_tokens=60,
            stop=["decode", "."],
        )
        return [(choice.message.content, choice.finish_reason) for choice in answer.choices]

    assert ask(local_graph) == ask(aggregated_graph)


@pytest.fixture
def pair_graph(tmp_path: Path) -> Iterator[Graph]:
    """deploy/local.yaml with one worker of each kind, where all prompts go through the prefill worker."""
    text = (ROOT / "deploy" / "local.yaml").read_text().replace("models/tiny", f"{ROOT}/models/tiny")
    text = text.replace("replicas: 2", "replicas: 1").replace("kv]", "kv, --disagg, always]")
    file = tmp_path / "pair.yaml"
    file.write_text(text)
    with running(file, tmp_path / "state", instances=2) as graph:
        yield graph


def test_second_turn_moves_fewer_blocks(pair_graph: Graph) -> None:
    """The decode worker keeps the conversation: what it has is not pulled again."""
    client = pair_graph.client()
    messages: list[dict[str, str]] = [
        {"role": "system", "content": "You are a helpful assistant. " * 12},
        {"role": "user", "content": "My name is Alice."},
    ]
    moved = []
    cached = []
    for question in ("What is my name?", "Explain disaggregated serving benefits"):
        before = pair_graph.metric("penstock_transferred_blocks_total")
        answer = client.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=30, temperature=0, extra_body={"cache_salt": "turns"}
        )
        moved.append(pair_graph.metric("penstock_transferred_blocks_total") - before)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        cached.append(answer.usage.prompt_tokens_details.cached_tokens or 0)
        messages += [
            {"role": "assistant", "content": answer.choices[0].message.content or ""},
            {"role": "user", "content": question},
        ]
    assert moved[0] > 0
    assert moved[1] < moved[0]
    assert cached[1] > cached[0]
