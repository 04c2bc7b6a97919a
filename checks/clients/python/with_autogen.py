"""AutoGen: its client of OpenAI's API, and its agent."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.base import TaskResult
from autogen_core.models import CreateResult, UserMessage
from autogen_ext.models.openai import OpenAIChatCompletionClient
from pydantic import BaseModel

Result = TypeVar("Result")


class Person(BaseModel):
    """A person."""

    name: str
    age: int


async def get_weather(city: str) -> int:
    """Get the weather in a city."""
    return 21 if city == "Paris" else -1


def with_client(model: str, ask: Callable[[OpenAIChatCompletionClient], Awaitable[Result]]) -> Result:
    """What `ask` gets of a client, which is closed in the end."""

    async def asking() -> Result:
        client = client_of(model)
        try:
            return await ask(client)
        finally:
            await client.close()

    return asyncio.run(asking())


def client_of(model: str) -> OpenAIChatCompletionClient:
    able = dict.fromkeys(("function_calling", "json_output", "structured_output"), True)
    return OpenAIChatCompletionClient(
        model=model,
        model_info={"vision": False, "family": "unknown", **able},
        include_name_in_message=False,
    )


def asked(text: str) -> list[UserMessage]:
    return [UserMessage(content=text, source="user")]


def test_client_answers_with_its_usage(model: str) -> None:
    result = with_client(model, lambda client: client.create(asked("My name is Alice. What is my name?")))
    assert "Alice" in result.content
    assert result.usage.completion_tokens > 0


def test_client_streams_the_answer(model: str) -> None:
    async def parts(client: OpenAIChatCompletionClient) -> list[str | CreateResult]:
        stream = client.create_stream(asked("My name is Alice. What is my name?"))
        return [part async for part in stream]

    *texts, result = with_client(model, parts)
    assert len(texts) > 1
    assert "".join(texts) == result.content
    assert "Alice" in result.content


def test_client_gives_an_object_of_the_model(model: str) -> None:
    result = with_client(
        model, lambda client: client.create(asked("Alice is 30 years old."), json_output=Person)
    )
    assert Person.model_validate_json(result.content).age == 30


@pytest.mark.parametrize("streamed", [False, True])
def test_agent_calls_the_tool_and_answers_with_its_result(model: str, streamed: bool) -> None:
    async def run(client: OpenAIChatCompletionClient) -> TaskResult:
        agent = AssistantAgent(
            "assistant",
            client,
            tools=[get_weather],
            reflect_on_tool_use=True,
            model_client_stream=streamed,
            system_message=None,
        )
        return await agent.run(task="What is the weather in Paris?")

    messages = [
        it for it in with_client(model, run).messages if it.type != "ModelClientStreamingChunkEvent"
    ]
    _, call, told, answer = messages
    assert [(it.name, it.arguments) for it in call.content] == [("get_weather", '{"city": "Paris"}')]
    assert told.content[0].content == "21"
    assert "21" in answer.content
