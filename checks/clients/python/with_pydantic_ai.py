"""Pydantic AI: its model classes for chats, for the Responses API and for Anthropic's Messages API."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.messages import ToolCallPart
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel

QUESTION = "My name is Alice. What is my name?"


class Person(BaseModel):
    name: str
    age: int


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    """One for all tests, as the models' connections outlive a test."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(params=[OpenAIChatModel, OpenAIResponsesModel, AnthropicModel])
def agent(request: pytest.FixtureRequest, model: str) -> Agent:
    return Agent(request.param(model))


def test_run_answers_a_question(agent: Agent, loop: asyncio.Runner) -> None:
    result = loop.run(agent.run(QUESTION))
    assert "Alice" in result.output
    assert result.usage.output_tokens > 0


def test_run_stream_streams_the_answer(agent: Agent, loop: asyncio.Runner) -> None:
    async def streamed() -> list[str]:
        async with agent.run_stream(QUESTION) as result:
            return [delta async for delta in result.stream_text(delta=True, debounce_by=None)]

    assert "Alice" in "".join(loop.run(streamed()))


def test_message_history_is_remembered(agent: Agent, loop: asyncio.Runner) -> None:
    async def conversation() -> str:
        first = await agent.run("My name is Alice.")
        return (await agent.run("What is my name?", message_history=first.all_messages())).output

    assert "Alice" in loop.run(conversation())


def test_run_calls_the_tool_and_answers_with_its_result(agent: Agent, loop: asyncio.Runner) -> None:
    @agent.tool_plain
    def get_weather(city: str) -> dict[str, int]:
        """Get the weather in a city."""
        return {"temperature_c": 21 if city == "Paris" else -1}

    result = loop.run(agent.run("What is the weather in Paris?"))
    calls = [
        part
        for message in result.all_messages()
        for part in message.parts
        if isinstance(part, ToolCallPart)
    ]
    assert [(call.tool_name, call.args_as_dict()) for call in calls] == [("get_weather", {"city": "Paris"})]
    assert "21" in result.output


def test_output_type_gives_an_object_of_that_type(agent: Agent, loop: asyncio.Runner) -> None:
    result = loop.run(agent.run("Alice is 30 years old.", output_type=Person))
    assert isinstance(result.output, Person)
    assert result.output.age == 30


@pytest.mark.parametrize("agent", [OpenAIChatModel, OpenAIResponsesModel], indirect=True)
def test_native_output_gives_an_object_of_that_type(agent: Agent, loop: asyncio.Runner) -> None:
    result = loop.run(agent.run("Alice is 30 years old.", output_type=NativeOutput(Person)))
    assert isinstance(result.output, Person)
    assert result.output.age == 30
