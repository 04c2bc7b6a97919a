"""What is asked of one worker alone first, so that every answer of a graph can be held against it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, NamedTuple

import openai
from openai.types import Completion

from tests.e2e.conftest import MODEL
from tests.e2e.test_equality import SAMPLINGS

BLOCK = 32
PAIR = "[0-9a-f]{2} "  # what may come next depends on where in it an answer is
STRUCTURED = {
    "structured": {"temperature": 0},
    "structured-seeded": {"temperature": 0.9, "seed": 5},
}


class Answer(NamedTuple):
    """What must be equal, whoever answers."""

    text: str
    tokens: tuple[str, ...]
    finish_reason: str | None


@dataclass(frozen=True)
class Question:
    """A completion of token ids, to its full length."""

    tokens: tuple[int, ...]
    sampling: str
    max_tokens: int = 24

    def ask(self, client: openai.OpenAI, *, stream: bool = False) -> Any:
        sampling = dict((SAMPLINGS | STRUCTURED)[self.sampling])
        extra = {"ignore_eos": True, **sampling.pop("extra_body", {})}
        if self.sampling in STRUCTURED:
            extra["structured_outputs"] = {"regex": f"({PAIR}){{200}}"}
        return client.completions.create(
            model=MODEL,
            prompt=list(self.tokens),
            max_tokens=self.max_tokens,
            logprobs=2,
            stream=stream,
            extra_body=extra,
            **sampling,
        )

    def answer(self, client: openai.OpenAI) -> Answer:
        completion: Completion = self.ask(client)
        choice = completion.choices[0]
        assert choice.logprobs is not None
        assert completion.usage is not None
        assert completion.usage.completion_tokens == len(choice.logprobs.tokens or ()) == self.max_tokens
        return Answer(choice.text, tuple(choice.logprobs.tokens or ()), choice.finish_reason)


def prompt(length: int, seed: int) -> tuple[int, ...]:
    """Any tokens do: equality needs no sense. Special ones are left out."""
    rng = random.Random(seed)
    return tuple(rng.randrange(300, 900) for _ in range(length))


LENGTHS = [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 200, 500]
BOUNDARIES = {
    f"{length}-{sampling}": Question(prompt(length, seed=length), sampling)
    for length in LENGTHS
    for sampling in SAMPLINGS
}

_SHARED = prompt(400, seed=99)
SHARING = [
    Question(_SHARED[: 35 * number] + prompt(30, seed=number), list(SAMPLINGS)[number % 3])
    for number in range(12)
]
"""Twelve that begin alike, for several lengths."""

LONG = [
    Question(prompt(100 + 30 * number, seed=1000 + number), sampling, max_tokens=150)
    for number, sampling in enumerate([*SAMPLINGS, *SAMPLINGS, *STRUCTURED])
]
"""Eight that take long enough for something to happen to them."""


def everything() -> list[Question]:
    return [*BOUNDARIES.values(), *SHARING, *LONG]
