"""smolagents: its model class for OpenAI-compatible servers, and its agent that calls tools."""

from __future__ import annotations

import os

import pytest
from smolagents import ActionStep, ChatMessage, OpenAIModel, ToolCallingAgent, tool

QUESTION = [ChatMessage("user", [{"type": "text", "text": "My name is Alice. What is my name?"}])]


@tool
def get_weather(city: str) -> int:
    """Get the weather in a city.

    Args:
        city: the city's name.
    """
    return 21 if city == "Paris" else -1


@pytest.fixture
def llm(model: str) -> OpenAIModel:
    base = os.environ["OPENAI_BASE_URL"]
    return OpenAIModel(model_id=model, api_base=base, api_key="none", temperature=0)


def test_model_answers(llm: OpenAIModel) -> None:
    assert "Alice" in llm.generate(QUESTION).content


def test_model_streams_the_answer(llm: OpenAIModel) -> None:
    assert "Alice" in "".join(delta.content or "" for delta in llm.generate_stream(QUESTION))


def test_model_calls_the_tool(llm: OpenAIModel) -> None:
    asked = [ChatMessage("user", [{"type": "text", "text": "What is the weather in Paris?"}])]
    (call,) = llm.generate(asked, tools_to_call_from=[get_weather]).tool_calls
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"city": "Paris"}')


@pytest.mark.parametrize("streamed", [False, True])
def test_each_step_of_the_agent_calls_a_tool_of_its_own(llm: OpenAIModel, streamed: bool) -> None:
    """It must call a tool in each step, with a system prompt of 2,000 tokens: more than the model was made
    for, so what it calls is not said."""
    agent = ToolCallingAgent(tools=[get_weather], model=llm, max_steps=3, stream_outputs=streamed)
    agent.run("What is the weather in Paris?")
    steps = [step for step in agent.memory.steps if isinstance(step, ActionStep)]
    called = [step for step in steps if step.step_number <= agent.max_steps]
    assert called
    for step in called:
        assert step.error is None
        assert {call.name for call in step.tool_calls} <= {"get_weather", "final_answer"}
