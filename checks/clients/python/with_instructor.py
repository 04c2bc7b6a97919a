"""Instructor: objects of Pydantic models, by its default mode and by JSON schema."""

from __future__ import annotations

import instructor
import pytest
from openai import OpenAI
from pydantic import BaseModel


# Instructor's tools are not strict, so vLLM leaves their arguments to the model, which knows these.
class Sum(BaseModel):
    """Add two numbers."""

    a: int
    b: int


@pytest.fixture(
    params=[instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA, instructor.Mode.RESPONSES_TOOLS]
)
def client(request: pytest.FixtureRequest) -> instructor.Instructor:
    return instructor.from_openai(OpenAI(), mode=request.param)


def test_create_gives_an_object_of_the_model(client: instructor.Instructor, model: str) -> None:
    asked = client.create(
        model=model,
        response_model=Sum,
        max_retries=0,
        messages=[{"role": "user", "content": "What is 3 plus 4?"}],
    )
    assert (asked.a, asked.b) == (3, 4)


def test_create_partial_streams_to_the_same_object(client: instructor.Instructor, model: str) -> None:
    *_, last = client.create_partial(
        model=model,
        response_model=Sum,
        max_retries=0,
        messages=[{"role": "user", "content": "What is 3 plus 4?"}],
    )
    assert (last.a, last.b) == (3, 4)
