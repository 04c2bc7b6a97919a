"""Haystack: its generator for OpenAI's API, and its agent."""

from __future__ import annotations

import json

import pytest
from haystack.components.agents import Agent
from haystack.components.generators.chat import OpenAIChatGenerator, OpenAIResponsesChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import tool
from pydantic import BaseModel

QUESTION = [ChatMessage.from_user("My name is Alice. What is my name?")]
GENERATORS = {"chat": OpenAIChatGenerator, "responses": OpenAIResponsesChatGenerator}


class Person(BaseModel):
    """A person."""

    name: str
    age: int


@tool
def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return json.dumps({"temperature_c": 21 if city == "Paris" else -1})


@pytest.fixture(params=GENERATORS)
def generator(request: pytest.FixtureRequest) -> type:
    return GENERATORS[request.param]


def test_generator_answers(generator: type, model: str) -> None:
    (reply,) = generator(model=model).run(QUESTION)["replies"]
    assert "Alice" in reply.text


def test_generator_streams_the_answer(generator: type, model: str) -> None:
    chunks = []
    (reply,) = generator(model=model, streaming_callback=chunks.append).run(QUESTION)["replies"]
    assert "Alice" in reply.text
    assert len(chunks) > 1


@pytest.mark.parametrize("streamed", [False, True])
def test_agent_calls_the_tool_and_answers_with_its_result(
    generator: type, model: str, streamed: bool
) -> None:
    callback = (lambda chunk: None) if streamed else None
    agent = Agent(chat_generator=generator(model=model, streaming_callback=callback), tools=[get_weather])
    result = agent.run([ChatMessage.from_user("What is the weather in Paris?")])
    _, asked, told, answer = [it for it in result["messages"] if it.role != "system"]
    assert [(call.tool_name, call.arguments) for call in asked.tool_calls] == [
        ("get_weather", {"city": "Paris"})
    ]
    assert told.tool_call_result is not None
    assert "21" in answer.text


def test_generator_gives_an_object_of_the_model(model: str) -> None:
    wanted = {"response_format": Person}
    generator = OpenAIChatGenerator(model=model, generation_kwargs=wanted)
    (reply,) = generator.run([ChatMessage.from_user("Alice is 30 years old.")])["replies"]
    assert Person.model_validate_json(reply.text).age == 30
