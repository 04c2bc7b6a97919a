"""The OpenAI Agents SDK: its default model class, which asks the Responses API, and the one for chats."""

from __future__ import annotations

import asyncio

import pytest
from agents import (
    Agent,
    AsyncOpenAI,
    OpenAIChatCompletionsModel,
    Runner,
    SQLiteSession,
    function_tool,
    set_default_openai_client,
    set_tracing_disabled,
)
from pydantic import BaseModel

set_tracing_disabled(True)  # traces would go to OpenAI


class Person(BaseModel):
    name: str
    age: int


@function_tool
def get_weather(city: str) -> dict[str, int]:
    """Get the weather in a city."""
    return {"temperature_c": 21 if city == "Paris" else -1}


@pytest.fixture(params=["default", "chat"])
def agent(request: pytest.FixtureRequest, model: str) -> Agent:
    client = AsyncOpenAI()  # its connections belong to one event loop, and each test has its own
    if request.param == "chat":
        return Agent(name="helper", model=OpenAIChatCompletionsModel(model, client))
    set_default_openai_client(client)
    return Agent(name="helper", model=model)


def test_run_answers_a_question(agent: Agent) -> None:
    result = Runner.run_sync(agent, "My name is Alice. What is my name?")
    assert "Alice" in result.final_output
    assert result.context_wrapper.usage.output_tokens > 0


def test_streamed_run_streams_the_answer(agent: Agent) -> None:
    async def streamed() -> tuple[str, str]:
        result = Runner.run_streamed(agent, "My name is Alice. What is my name?")
        deltas = [
            event.data.delta
            async for event in result.stream_events()
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
        ]
        return "".join(deltas), result.final_output

    streamed_text, final = asyncio.run(streamed())
    assert streamed_text == final
    assert "Alice" in final


def test_session_remembers_what_was_said_before(agent: Agent) -> None:
    session = SQLiteSession("alice")
    Runner.run_sync(agent, "My name is Alice.", session=session)
    result = Runner.run_sync(agent, "What is my name?", session=session)
    assert "Alice" in result.final_output


def test_previous_response_id_continues_the_stored_conversation(model: str) -> None:
    agent = Agent(name="helper", model=model)
    first = Runner.run_sync(agent, "My name is Alice.")
    result = Runner.run_sync(agent, "What is my name?", previous_response_id=first.last_response_id)
    assert "Alice" in result.final_output


def test_run_calls_the_tool_and_answers_with_its_result(agent: Agent) -> None:
    agent.tools = [get_weather]
    result = Runner.run_sync(agent, "What is the weather in Paris?")
    kinds = [item.type for item in result.new_items]
    assert kinds == ["tool_call_item", "tool_call_output_item", "message_output_item"]
    assert "21" in result.final_output


def test_streamed_run_calls_the_tool_and_answers_with_its_result(agent: Agent) -> None:
    agent.tools = [get_weather]

    async def streamed() -> tuple[list[str], str]:
        result = Runner.run_streamed(agent, "What is the weather in Paris?")
        kinds = [
            event.item.type
            async for event in result.stream_events()
            if event.type == "run_item_stream_event"
        ]
        return kinds, result.final_output

    kinds, final = asyncio.run(streamed())
    assert kinds == ["tool_call_item", "tool_call_output_item", "message_output_item"]
    assert "21" in final


def test_output_type_gives_an_object_of_that_type(agent: Agent) -> None:
    agent.output_type = Person
    result = Runner.run_sync(agent, "Alice is 30 years old.")
    assert isinstance(result.final_output, Person)
    assert result.final_output.age == 30
