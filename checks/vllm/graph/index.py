"""What the router's index foresees is what vLLM then finds cached."""

from __future__ import annotations

import concurrent.futures

import pytest

from checks.vllm.graph.questions import BLOCK, prompt
from tests.e2e.conftest import MODEL, Graph
from tests.waiting import wait_until

NAMES = ["Alice", "Bob", "Carol", "Dave", "Erin", "Frank", "Grace", "Heidi"]
QUESTIONS = ["What is my name?", "Explain disaggregated serving benefits", "Who am I?", "Thank you!"]


class Overlap:
    """Predicted and actual cached tokens from here on."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._before = self._now()

    def _now(self) -> tuple[float, float]:
        return (
            self._graph.metric("penstock_predicted_cached_tokens_total"),
            self._graph.metric("penstock_actual_cached_tokens_total"),
        )

    def since(self) -> tuple[float, float]:
        predicted, actual = self._now()
        return predicted - self._before[0], actual - self._before[1]


def settled(graph: Graph) -> None:
    """Until the workers have told of the end of all that ran, and with it of what they have cached."""

    def busy() -> float:
        return graph.metric("penstock_worker_used_blocks") + graph.metric("penstock_worker_running")

    wait_until(lambda: busy() == 0, "the workers are idle", look_s=0.1)


def converse(graph: Graph, name: str) -> None:
    client = graph.client()
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": f"My name is {name}."},
    ]
    for question in QUESTIONS * 2:
        answer = client.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=60, temperature=0
        )
        messages.append({"role": "assistant", "content": answer.choices[0].message.content or ""})
        messages.append({"role": "user", "content": question})


def test_conversations(pair: Graph) -> None:
    """Eight conversations of eight turns over two decode workers, four at a time."""
    overlap = Overlap(pair)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: converse(pair, name), NAMES))
    predicted, actual = overlap.since()
    print(f"predicted {predicted:.0f}, actual {actual:.0f} cached tokens")
    assert actual > 5000
    assert predicted == pytest.approx(actual, rel=0.02)


def test_prompts_that_end_with_a_block(pair: Graph) -> None:
    """A prompt that is cached as a whole: its last token is computed again, and so its last block."""
    settled(pair)
    overlap = Overlap(pair)
    client = pair.client()
    for blocks in (1, 2, 5):
        tokens = list(prompt(blocks * BLOCK, seed=7000 + blocks))
        for _ in range(3):
            for asked in (tokens, tokens + tokens[:1]):
                client.completions.create(model=MODEL, prompt=asked, max_tokens=2)
                settled(pair)
    predicted, actual = overlap.since()
    assert actual > 1000
    assert predicted == actual


def test_no_worker_was_distrusted(pair: Graph) -> None:
    assert "kv overlap check" not in pair.command("logs", "frontend").stdout
