"""Outlines with OpenAI's API, and with what vLLM's server has beyond it."""

from __future__ import annotations

from typing import Any, Literal

import openai
import outlines
import pytest
from outlines.types import CFG, Regex
from pydantic import BaseModel

QUESTION = "My name is Alice. What is my name?"
MAKERS = {"openai": outlines.from_openai, "vllm": outlines.from_vllm}


class Person(BaseModel):
    """A person."""

    name: str
    age: int


@pytest.fixture(params=MAKERS)
def llm(request: pytest.FixtureRequest, model: str) -> Any:
    return MAKERS[request.param](openai.OpenAI(), model)


@pytest.fixture
def vllm(model: str) -> Any:
    return outlines.from_vllm(openai.OpenAI(), model)


def test_model_answers_whole_and_streamed_with_the_same_text(llm: Any) -> None:
    answer = llm(QUESTION, temperature=0)
    assert "Alice" in answer
    assert "".join(llm.stream(QUESTION, temperature=0)) == answer


def test_model_gives_several_answers(llm: Any) -> None:
    assert len(llm(QUESTION, n=2, max_tokens=8)) == 2


def test_model_gives_an_object_whole_and_streamed(llm: Any) -> None:
    assert Person.model_validate_json(llm("Alice is 30 years old.", Person)).age == 30
    assert Person.model_validate_json("".join(llm.stream("Alice is 30 years old.", Person))).age == 30


@pytest.mark.parametrize(
    ("kind", "allowed"),
    [
        (Literal["yes", "no"], {"yes", "no"}),
        (bool, {"True", "False"}),
        (Regex("[0-3]"), set("0123")),
        (CFG('?start: word\nword: "a" | "b"'), {"a", "b"}),
        (CFG('root ::= "a" | "b"'), {"a", "b"}),
    ],
)
def test_output_has_the_form_that_only_vllm_takes(vllm: Any, kind: Any, allowed: set[str]) -> None:
    assert vllm("Is it so?", kind) in allowed
