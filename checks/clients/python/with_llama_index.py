"""LlamaIndex with its model class for OpenAI-compatible servers."""

from __future__ import annotations

import asyncio
import os

import pytest
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

MESSAGES = [ChatMessage(role="user", content="My name is Alice. What is my name?")]


class Sum(BaseModel):
    """Add two numbers."""

    a: int
    b: int


@pytest.fixture
def llm(model: str) -> OpenAILike:
    return OpenAILike(
        model=model,
        api_base=os.environ["OPENAI_BASE_URL"],
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
    )


def test_chat_answers(llm: OpenAILike) -> None:
    assert "Alice" in llm.chat(MESSAGES).message.content


def test_stream_chat_streams_the_answer(llm: OpenAILike) -> None:
    assert "Alice" in "".join(part.delta for part in llm.stream_chat(MESSAGES))


def test_acomplete_answers(llm: OpenAILike) -> None:
    assert "Alice" in asyncio.run(llm.acomplete(MESSAGES[0].content)).text


def test_agent_calls_the_tool_and_answers_with_its_result(llm: OpenAILike) -> None:
    def get_weather(city: str) -> int:
        """Get the weather in a city."""
        return 21 if city == "Paris" else -1

    async def asked() -> tuple[str, list[dict]]:
        result = await FunctionAgent(tools=[get_weather], llm=llm).run("What is the weather in Paris?")
        return str(result), [call.tool_kwargs for call in result.tool_calls]

    answer, calls = asyncio.run(asked())
    assert calls == [{"city": "Paris"}]
    assert "21" in answer


def test_structured_predict_gives_an_object_of_the_model(llm: OpenAILike) -> None:
    asked = llm.structured_predict(Sum, PromptTemplate("What is 3 plus 4?"))
    assert isinstance(asked, Sum)
    assert (asked.a, asked.b) == (3, 4)
