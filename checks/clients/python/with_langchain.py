"""LangChain: OpenAI's chat model with both of its APIs, and Anthropic's."""

from __future__ import annotations

import pytest
from langchain.agents import create_agent
from langchain_anthropic import ChatAnthropic
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

QUESTION = "My name is Alice. What is my name?"


class Person(BaseModel):
    """A person."""

    name: str
    age: int


@tool
def get_weather(city: str) -> dict[str, int]:
    """Get the weather in a city."""
    return {"temperature_c": 21 if city == "Paris" else -1}


@pytest.fixture(params=["chat", "responses", "anthropic"])
def chat(request: pytest.FixtureRequest, model: str) -> BaseChatModel:
    if request.param == "anthropic":
        return ChatAnthropic(model_name=model, max_tokens=200)
    return ChatOpenAI(model=model, use_responses_api=request.param == "responses")


def test_invoke_answers_with_its_usage(chat: BaseChatModel) -> None:
    message = chat.invoke(QUESTION)
    assert "Alice" in message.text
    assert message.usage_metadata["output_tokens"] > 0


def test_stream_streams_the_answer(chat: BaseChatModel) -> None:
    chunks = list(chat.stream(QUESTION))
    assert "Alice" in "".join(chunk.text for chunk in chunks)
    assert len(chunks) > 1


def test_batch_answers_each(chat: BaseChatModel) -> None:
    answers = chat.batch(["My name is Alice. What is my name?", "My name is Bob. What is my name?"])
    assert ["Alice" in answers[0].text, "Bob" in answers[1].text] == [True, True]


def test_chat_gives_log_probabilities(model: str) -> None:
    message = ChatOpenAI(model=model).bind(logprobs=True).invoke(QUESTION)
    assert message.response_metadata["logprobs"]["content"]


def test_completion_model_continues_a_text(model: str) -> None:
    assert OpenAI(model=model, max_tokens=8).invoke("Prefill")


def test_agent_calls_the_tool_and_answers_with_its_result(chat: BaseChatModel) -> None:
    agent = create_agent(chat, [get_weather])
    result = agent.invoke({"messages": [{"role": "user", "content": "What is the weather in Paris?"}]})
    _, asked, told, answer = result["messages"]
    assert isinstance(asked, AIMessage)
    assert [(call["name"], call["args"]) for call in asked.tool_calls] == [
        ("get_weather", {"city": "Paris"})
    ]
    assert isinstance(told, ToolMessage)
    assert "21" in answer.text


def test_streamed_tool_call_has_its_arguments(chat: BaseChatModel) -> None:
    whole = None
    for chunk in chat.bind_tools([get_weather]).stream("What is the weather in Paris?"):
        whole = chunk if whole is None else whole + chunk
    assert [(call["name"], call["args"]) for call in whole.tool_calls] == [
        ("get_weather", {"city": "Paris"})
    ]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_gives_an_object_of_the_model(chat: BaseChatModel, method: str) -> None:
    person = chat.with_structured_output(Person, method=method).invoke("Alice is 30 years old.")
    assert isinstance(person, Person)
    assert person.age == 30
