"""Answers of the Responses API, of Anthropic's Messages API and of the tokenizer's endpoints, streamed or
not, in shapes that can be compared.

What is left out is the same as of chats (answers.py), and how an answer is cut into items: its reasoning,
its texts and its calls are compared each as one.
"""

from __future__ import annotations

import json
from typing import Any

import httpx

Answer = dict[str, Any]
Event = dict[str, Any]

RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
UNSTREAMED = (COUNT, "/tokenize", "/detokenize")
OTHER_PATHS = (RESPONSES, MESSAGES, *UNSTREAMED)


def ask_other(server: httpx.Client, path: str, body: dict[str, Any], *, stream: bool) -> Answer:
    """The answer's shape: `status`, and if it is 200 what it says."""
    response = server.post(path, json={**body, "stream": True} if stream else body)
    if response.status_code != 200:
        assert response.json()["error"]["message"]
        return {"status": response.status_code}
    if path == COUNT:  # vLLM also says what the count was before it edited the context, which neither does
        return {"status": 200, "input_tokens": response.json()["input_tokens"]}
    if path in UNSTREAMED:
        return {"status": 200, **response.json()}
    if not stream:
        whole = _response if path == RESPONSES else _message
        return whole(response.json())
    streamed = _streamed_response if path == RESPONSES else _streamed_message
    return streamed(_events(response.text))


def _events(text: str) -> list[Event]:
    events = []
    for event in text.strip().split("\n\n"):
        name, data = event.split("\n", 1)
        fields = json.loads(data.removeprefix("data: "))
        assert name == f"event: {fields['type']}"
        events.append(fields)
    return events


# --- the Responses API ----------------------------------------------------------------------------


def _response(response: dict[str, Any]) -> Answer:
    texts: dict[str, str] = {"reasoning": "", "message": ""}
    calls = []
    for item in response["output"]:
        if item["type"] == "function_call":
            calls.append({"name": item["name"], "arguments": item["arguments"]})
        else:
            texts[item["type"]] += "".join(part["text"] for part in item["content"] or ())
    usage = response["usage"]
    return {
        "status": 200,
        "ended": response["status"],
        "why": (response["incomplete_details"] or {}).get("reason"),
        **texts,
        "calls": calls,
        "usage": {name: usage[name] for name in ("input_tokens", "output_tokens", "total_tokens")},
        "reasoning_tokens": usage["output_tokens_details"]["reasoning_tokens"],
    }


def _streamed_response(events: list[Event]) -> Answer:
    """The last response, once its events were found to have told the same."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    last = events[-1]["response"]
    shape = _response(last)
    for name, kind in (
        ("reasoning", "response.reasoning_text.delta"),
        ("message", "response.output_text.delta"),
    ):
        told = "".join(event["delta"] for event in events if event["type"] == kind)
        assert told == shape[name], (told, shape[name])
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    told_calls = [(item["name"], item["arguments"]) for item in done if item["type"] == "function_call"]
    assert told_calls == [(call["name"], call["arguments"]) for call in shape["calls"]]
    return shape


# --- the Messages API -----------------------------------------------------------------------------


def _message(message: dict[str, Any]) -> Answer:
    texts = {"thinking": "", "text": ""}
    calls = []
    for block in message["content"]:
        if block["type"] == "tool_use":
            calls.append({"name": block["name"], "input": block["input"]})
        else:
            texts[block["type"]] += block[block["type"]]
    usage = message["usage"]
    return {
        "status": 200,
        **texts,
        "calls": calls,
        "stop_reason": message["stop_reason"],
        "stop_sequence": message.get("stop_sequence"),
        "input_tokens": usage["input_tokens"] + usage.get("cache_read_input_tokens", 0),
        "output_tokens": usage["output_tokens"],
    }


def _streamed_message(events: list[Event]) -> Answer:
    """The message that the events make together."""
    blocks: list[dict[str, Any]] = []
    message: dict[str, Any] = {}
    for event in events:
        match event["type"]:
            case "message_start":
                message = event["message"]
            case "content_block_start":
                assert event["index"] == len(blocks)
                blocks.append({**event["content_block"], "json": ""})
            case "content_block_delta":
                delta = event["delta"]
                block = blocks[event["index"]]
                if delta["type"] == "input_json_delta":
                    block["json"] += delta["partial_json"]
                elif delta["type"] != "signature_delta":
                    name = delta["type"].removesuffix("_delta")
                    block[name] = (block.get(name) or "") + delta[name]
            case "message_delta":
                message |= event["delta"]
                message["usage"] |= event["usage"]
    assert events[-1]["type"] == "message_stop"
    for block in blocks:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block["json"] or "{}")
    return _message({**message, "content": blocks})
