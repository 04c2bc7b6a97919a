"""LiteLLM's SDK: the providers for OpenAI, for vLLM servers and for Anthropic."""

from __future__ import annotations

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would be downloaded

import json

import litellm
import pytest

MESSAGES = [{"role": "user", "content": "My name is Alice. What is my name?"}]


@pytest.fixture(params=["openai", "hosted_vllm", "anthropic"])
def wanted(request: pytest.FixtureRequest, model: str) -> dict[str, str]:
    """What each call has: the provider's model and where its server is."""
    base = os.environ["ANTHROPIC_BASE_URL" if request.param == "anthropic" else "OPENAI_BASE_URL"]
    return {"model": f"{request.param}/{model}", "api_base": base, "api_key": "none"}


def test_completion_answers_with_its_usage(wanted: dict[str, str]) -> None:
    answer = litellm.completion(**wanted, messages=MESSAGES)
    assert "Alice" in answer.choices[0].message.content
    assert answer.usage.completion_tokens > 0


def test_streamed_completion_streams_the_answer(wanted: dict[str, str]) -> None:
    chunks = litellm.completion(**wanted, messages=MESSAGES, stream=True)
    assert "Alice" in "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_responses_answers(wanted: dict[str, str]) -> None:
    assert "Alice" in litellm.responses(**wanted, input=MESSAGES[0]["content"]).output_text


def test_completion_calls_the_tool_and_answers_with_its_result(wanted: dict[str, str]) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tool = {"name": "get_weather", "description": "Get the weather in a city.", "parameters": parameters}
    tools = [{"type": "function", "function": tool}]
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    asked = litellm.completion(**wanted, messages=messages, tools=tools).choices[0].message
    (call,) = asked.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"temperature_c": 21}'}
    told = litellm.completion(**wanted, messages=[*messages, asked.model_dump(), result], tools=tools)
    assert "21" in told.choices[0].message.content
