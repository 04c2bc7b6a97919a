"""OpenAI's and Anthropic's SDKs against the local graph. Their models validate every answer and event."""

from __future__ import annotations

import json
from collections.abc import Iterator

import anthropic
import openai
import pytest
from pydantic import BaseModel

from tests.e2e.conftest import MODEL, Graph

QUESTION = "My name is Alice. What is my name?"
ANSWER = "Your name is Alice."
WEATHER = {
    "name": "get_weather",
    "description": "Get the weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}


class Person(BaseModel):
    name: str
    age: int


def weather(city: str) -> str:
    return json.dumps({"temperature_c": 21 if city == "Paris" else -1})


@pytest.fixture
def client(local_graph: Graph) -> openai.OpenAI:
    """It validates what it is sent, events too; by default it would take what comes."""
    return local_graph.client(_strict_response_validation=True)


@pytest.fixture
def claude(local_graph: Graph) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(
        base_url=local_graph.url, api_key="none", max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


# --- OpenAI: chats and completions --------------------------------------------------------------------


def test_openai_chat_whole_and_streamed_give_the_same_text(client: openai.OpenAI) -> None:
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    answer = client.chat.completions.create(model=MODEL, messages=messages)
    with client.chat.completions.stream(
        model=MODEL, messages=messages, stream_options={"include_usage": True}
    ) as stream:
        streamed = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert answer.choices[0].message.content == streamed == final.choices[0].message.content == ANSWER
    assert final.usage is not None
    assert final.usage.completion_tokens == answer.usage.completion_tokens


def test_openai_chat_with_choices_and_log_probabilities_fits_the_models(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": QUESTION}],
        n=3,
        logprobs=True,
        top_logprobs=2,
        max_completion_tokens=8,
        temperature=1,
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert all(len(choice.logprobs.content) <= 8 for choice in answer.choices)


def test_openai_completions_whole_and_streamed_give_the_same_text(
    client: openai.OpenAI, local_graph: Graph
) -> None:
    wanted = {"model": MODEL, "prompt": "Prefill", "max_tokens": 12, "logprobs": 1}
    answer = client.completions.create(**wanted)
    # As OpenAI does, chunks have a null `finish_reason` until the last one; the model does not allow it.
    with local_graph.client().completions.create(**wanted, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def test_openai_models_list_and_retrieve_give_the_served_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


# --- OpenAI: responses --------------------------------------------------------------------------------


def test_openai_response_whole_and_streamed_give_the_same_text(client: openai.OpenAI) -> None:
    wanted = {"model": MODEL, "instructions": "Be brief.", "input": QUESTION}
    response = client.responses.create(**wanted)
    with client.responses.stream(**wanted) as stream:
        streamed = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert response.output_text == streamed == final.output_text == ANSWER
    assert final.usage.output_tokens == response.usage.output_tokens


def test_openai_response_is_continued_retrieved_and_deleted(client: openai.OpenAI) -> None:
    first = client.responses.create(model=MODEL, input="My name is Alice.")
    second = client.responses.create(model=MODEL, input="What is my name?", previous_response_id=first.id)
    assert second.output_text == ANSWER
    assert client.responses.retrieve(second.id).output_text == ANSWER
    assert [item.type for item in client.responses.input_items.list(second.id)] == ["message"]
    client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second.id)


# --- Anthropic ----------------------------------------------------------------------------------------


def test_anthropic_message_whole_and_streamed_give_the_same_text(claude: anthropic.Anthropic) -> None:
    wanted = {
        "model": MODEL,
        "max_tokens": 50,
        "system": "Be brief.",
        "messages": [{"role": "user", "content": QUESTION}],
    }
    message = claude.messages.create(**wanted)
    with claude.messages.stream(**wanted) as stream:
        streamed = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert message.content[0].text == streamed == final.content[0].text == ANSWER
    assert (message.stop_reason, final.stop_reason) == ("end_turn", "end_turn")


def test_anthropic_count_tokens_gives_the_tokens_of_the_prompt(claude: anthropic.Anthropic) -> None:
    wanted = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}]}
    usage = claude.messages.create(**wanted, max_tokens=1).usage
    counted = claude.messages.count_tokens(**wanted).input_tokens
    assert counted == usage.input_tokens + usage.cache_read_input_tokens


def test_anthropic_models_list_and_retrieve_give_the_served_model(claude: anthropic.Anthropic) -> None:
    assert [model.id for model in claude.models.list()] == [MODEL]
    assert claude.models.retrieve(MODEL).id == MODEL


# --- tools and structured output ----------------------------------------------------------------------


def test_openai_chat_calls_the_tool_and_answers_with_its_result(client: openai.OpenAI) -> None:
    tools = [{"type": "function", "function": WEATHER}]
    messages: list = [{"role": "user", "content": "What is the weather in Paris?"}]
    asked = client.chat.completions.create(model=MODEL, messages=messages, tools=tools).choices[0]
    assert asked.finish_reason == "tool_calls"
    (call,) = asked.message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    result = {"role": "tool", "tool_call_id": call.id, "content": weather("Paris")}
    told = client.chat.completions.create(
        model=MODEL, messages=[*messages, asked.message, result], tools=tools
    )
    assert "21" in told.choices[0].message.content
    assert told.choices[0].finish_reason == "stop"


def test_openai_chat_streams_the_call_of_a_tool(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL,
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=[{"type": "function", "function": WEATHER}],
    ) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        final = stream.get_final_completion()
    assert [(event.name, event.parsed_arguments) for event in done] == [("get_weather", {"city": "Paris"})]
    assert final.choices[0].finish_reason == "tool_calls"


def test_openai_response_calls_the_tool_and_answers_with_its_result(client: openai.OpenAI) -> None:
    tools = [{"type": "function", **WEATHER}]
    asked = client.responses.create(model=MODEL, input="What is the weather in Paris?", tools=tools)
    (call,) = asked.output
    assert (call.type, call.name, json.loads(call.arguments)) == (
        "function_call",
        "get_weather",
        {"city": "Paris"},
    )
    result = {"type": "function_call_output", "call_id": call.call_id, "output": weather("Paris")}
    told = client.responses.create(model=MODEL, input=[result], tools=tools, previous_response_id=asked.id)
    assert "21" in told.output_text


def test_openai_response_streams_the_call_of_a_tool(client: openai.OpenAI) -> None:
    with client.responses.stream(
        model=MODEL, input="What is the weather in Paris?", tools=[{"type": "function", **WEATHER}]
    ) as stream:
        done = [event for event in stream if event.type == "response.function_call_arguments.done"]
        final = stream.get_final_response()
    assert [json.loads(event.arguments) for event in done] == [{"city": "Paris"}]
    assert [item.type for item in final.output] == ["function_call"]


def test_openai_parse_gives_an_object_of_the_model(client: openai.OpenAI) -> None:
    told = "Alice is 30 years old."
    chat = client.chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": told}], response_format=Person
    )
    response = client.responses.parse(model=MODEL, input=told, text_format=Person)
    assert isinstance(response.output_parsed, Person)
    assert chat.choices[0].message.parsed == response.output_parsed


def test_anthropic_tool_runner_calls_the_tool_and_answers_with_its_result(
    claude: anthropic.Anthropic,
) -> None:
    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """Get the weather in a city."""
        return weather(city)

    messages = list(
        claude.beta.messages.tool_runner(
            model=MODEL,
            max_tokens=200,
            tools=[get_weather],
            messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        )
    )
    assert [message.stop_reason for message in messages] == ["tool_use", "end_turn"]
    assert messages[0].content[-1].input == {"city": "Paris"}
    assert "21" in messages[-1].content[0].text


def test_anthropic_stream_gives_the_call_of_a_tool(claude: anthropic.Anthropic) -> None:
    tool = {
        "name": "get_weather",
        "description": WEATHER["description"],
        "input_schema": WEATHER["parameters"],
    }
    with claude.messages.stream(
        model=MODEL,
        max_tokens=200,
        tools=[tool],
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
    ) as stream:
        final = stream.get_final_message()
    assert final.stop_reason == "tool_use"
    assert final.content[-1].input == {"city": "Paris"}


def test_anthropic_parse_gives_an_object_of_the_model(claude: anthropic.Anthropic) -> None:
    message = claude.messages.parse(
        model=MODEL,
        max_tokens=100,
        messages=[{"role": "user", "content": "Alice is 30 years old."}],
        output_format=Person,
    )
    assert isinstance(message.parsed_output, Person)
    assert message.parsed_output.age == 30
