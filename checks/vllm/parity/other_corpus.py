"""Requests of the Responses API, of Anthropic's Messages API and of the tokenizer's endpoints: by name, the
path and the body."""

from __future__ import annotations

from typing import Any

from checks.vllm.parity.corpus import ALICE, CLOCK, EXPLAIN, MODEL, PLAIN, UNICODE, WEATHER
from checks.vllm.parity.other_answers import COUNT, MESSAGES, RESPONSES

Request = tuple[str, dict[str, Any]]


def _flat(tool: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", **tool["function"]}


def _anthropic(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool["function"]
    return {"name": function["name"], "input_schema": function["parameters"]} | (
        {"description": function["description"]} if "description" in function else {}
    )


def _response(items: Any = ALICE, **fields: Any) -> Request:
    """With reasoning."""
    defaults = {"model": MODEL, "input": items, "temperature": 0, "max_output_tokens": 40}
    return RESPONSES, defaults | fields


def _plain_response(items: Any = ALICE, **fields: Any) -> Request:
    return _response(items, chat_template_kwargs=PLAIN, **fields)


def _message(messages: Any = ALICE[1:], **fields: Any) -> Request:
    """With reasoning."""
    defaults = {"model": MODEL, "system": ALICE[0]["content"], "messages": messages, "temperature": 0}
    return MESSAGES, defaults | {"max_tokens": 40} | fields


def _plain_message(messages: Any = ALICE[1:], **fields: Any) -> Request:
    return _message(messages, chat_template_kwargs=PLAIN, **fields)


WEATHER_ITEMS = [
    *ALICE[:2],
    {
        "type": "function_call",
        "id": "fc_1",
        "call_id": "call-1",
        "name": "get_weather",
        "arguments": '{"city": "Zürich", "unit": null}',
    },
    {"type": "function_call_output", "call_id": "call-1", "output": "12 °C"},
    ALICE[3],
]
WEATHER_BLOCKS = [
    ALICE[1],
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "I look."},
            {
                "type": "tool_use",
                "id": "call-1",
                "name": "get_weather",
                "input": {"city": "Zürich", "unit": None},
            },
        ],
    },
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call-1", "content": "12 °C"}]},
]
THOUGHT = {
    "type": "reasoning",
    "id": "rs_1",
    "summary": [],
    "content": [{"type": "reasoning_text", "text": "A name."}],
}

OTHERS: dict[str, Request] = {
    # The Responses API.
    "response": _plain_response(),
    "response to a text": _plain_response("What is my name?"),
    "response with instructions": _plain_response(ALICE[1:], instructions="You are a helpful assistant."),
    "response of parts": _plain_response(
        [{"role": "user", "content": [{"type": "input_text", "text": text} for text in ("My", "name?")]}]
    ),
    "response unicode": _plain_response(UNICODE),
    "response cut": _plain_response(EXPLAIN, max_output_tokens=5),
    "response stop": _plain_response(EXPLAIN, stop=["decode"], max_output_tokens=60),
    "response penalties": _plain_response(EXPLAIN, presence_penalty=1.0, repetition_penalty=1.2),
    "response after reasoning": _response(),
    "response, reasoning cut": _response(EXPLAIN, max_output_tokens=6),
    "response, reasoning by effort": _response(reasoning={"effort": "low"}),
    "response, no reasoning by effort": _response(reasoning={"effort": "none"}),
    "response, reasoning hidden": _response(include_reasoning=False),
    "response, reasoning given back": _plain_response(
        [
            *ALICE[:2],
            THOUGHT,
            {
                "type": "message",
                "id": "msg_1",
                "status": "completed",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "Hi.", "annotations": []}],
            },
            ALICE[3],
        ]
    ),
    "response, tools none called": _plain_response(tools=[_flat(WEATHER), _flat(CLOCK)]),
    "response, calls given back": _plain_response(WEATHER_ITEMS, tools=[_flat(WEATHER)]),
    "response, bad temperature": _response(temperature=-1),
    "response, unknown model": _response(model="nobody"),
    "response, no input": (RESPONSES, {"model": MODEL}),
    "response, too long": _response("word " * 9000),
    "response, prompt of a template": _response(prompt={"id": "p"}),
    "response, unknown previous": _response(previous_response_id="resp_unknown"),
    # The Messages API.
    "message": _plain_message(),
    "message of blocks": _plain_message(
        [{"role": "user", "content": [{"type": "text", "text": "What is my name?"}]}]
    ),
    "message with system in a block": _plain_message(
        system=[{"type": "text", "text": ALICE[0]["content"]}]
    ),
    "message unicode": _plain_message(UNICODE),
    "message cut": _plain_message(EXPLAIN, max_tokens=5),
    "message stop": _plain_message(EXPLAIN, stop_sequences=["decode", "zzz"], max_tokens=60),
    "message top_p top_k": _plain_message(EXPLAIN, temperature=0, top_p=0.9, top_k=20),
    "message after thinking": _message(),
    "message, thinking cut": _message(EXPLAIN, max_tokens=6),
    "message, thinking given back": _plain_message(
        [
            ALICE[1],
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "A name.", "signature": "s"},
                    {"type": "text", "text": "Hi."},
                ],
            },
            ALICE[3],
        ]
    ),
    "message, tools none called": _plain_message(tools=[_anthropic(WEATHER), _anthropic(CLOCK)]),
    "message, tools and none wanted": _plain_message(
        tools=[_anthropic(WEATHER)], tool_choice={"type": "none"}
    ),
    "message, calls given back": _plain_message(WEATHER_BLOCKS, tools=[_anthropic(WEATHER)]),
    "message without max_tokens": (MESSAGES, {"model": MODEL, "messages": ALICE[1:]}),
    "message of no tokens": _message(max_tokens=0),
    "message, unknown model": _message(model="nobody"),
    "message, too long": _message([{"role": "user", "content": "word " * 9000}]),
    # Counting and tokenizing.
    "count": (COUNT, {"model": MODEL, "messages": ALICE[1:], "system": "Be kind."}),
    "count with tools": (
        COUNT,
        {"model": MODEL, "messages": WEATHER_BLOCKS, "tools": [_anthropic(WEATHER)]},
    ),
    "tokenize": ("/tokenize", {"model": MODEL, "prompt": "My name is Zoë 你好 😀."}),
    "tokenize, plain": (
        "/tokenize",
        {"model": MODEL, "prompt": "a <think> b", "add_special_tokens": False},
    ),
    "tokenize, with names": ("/tokenize", {"model": MODEL, "prompt": "My name", "return_token_strs": True}),
    "tokenize a chat": ("/tokenize", {"model": MODEL, "messages": ALICE}),
    "tokenize a chat with tools": (
        "/tokenize",
        {"model": MODEL, "messages": ALICE, "tools": [WEATHER], "chat_template_kwargs": PLAIN},
    ),
    "tokenize a chat that goes on": (
        "/tokenize",
        {
            "model": MODEL,
            "messages": [*ALICE, {"role": "assistant", "content": "Your na"}],
            "add_generation_prompt": False,
            "continue_final_message": True,
        },
    ),
    "tokenize nothing": ("/tokenize", {"model": MODEL}),
    "tokenize, unknown model": ("/tokenize", {"model": "nobody", "prompt": "x"}),
    "detokenize": ("/detokenize", {"model": MODEL, "tokens": [10, 20, 30, 300, 301]}),
    "detokenize nothing": ("/detokenize", {"model": MODEL, "tokens": []}),
    "detokenize, foreign token": ("/detokenize", {"model": MODEL, "tokens": [5000]}),
}
