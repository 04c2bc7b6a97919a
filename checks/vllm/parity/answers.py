"""Answers of an OpenAI server, streamed or not, brought into one shape that can be compared.

What is left out, because it may differ: ids, times, fingerprints, the wording of errors, how a stream is
cut into chunks, fields that are null, and how many tokens were cached.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import httpx

Answer = dict[str, Any]

CALL_ID_PREFIXES = ("chatcmpl-tool-", "call_")  # of vLLM and of Penstock


def ask(server: httpx.Client, path: str, body: dict[str, Any], *, stream: bool) -> Answer:
    """The answer's shape: `status`, and if it is 200 `choices` and `usage`."""
    if stream:
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    response = server.post(path, json=body)
    if response.status_code != 200:
        assert response.json()["error"]["message"]
        return {"status": response.status_code}
    if not stream:
        return _whole(response.json())
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    if "error" in chunks[-1]:
        return {"status": chunks[-1]["error"]["code"]}
    return _streamed(chunks)


def _whole(answer: dict[str, Any]) -> Answer:
    choices = {}
    for choice in answer["choices"]:
        message = choice.get("message", {"content": choice.get("text")})
        calls = message.get("tool_calls") or []
        assert all(call["id"].startswith(CALL_ID_PREFIXES) for call in calls)
        choices[choice["index"]] = {
            "content": message["content"],
            "reasoning": message.get("reasoning"),
            "tool_calls": [call["function"] for call in calls],
            "logprobs": _logprobs(choice["logprobs"]),
            "prompt_logprobs": _prompt_logprobs(choice.get("prompt_logprobs")),
            "finish_reason": choice["finish_reason"],
            "stop_reason": choice["stop_reason"],
        }
    return {
        "status": 200,
        "choices": choices,
        "prompt_logprobs": _prompt_logprobs(answer.get("prompt_logprobs")),
        "usage": _usage(answer["usage"]),
    }


def _streamed(chunks: list[dict[str, Any]]) -> Answer:
    choices: dict[int, _Streamed] = defaultdict(_Streamed)
    for chunk in chunks:
        for choice in chunk["choices"]:
            choices[choice["index"]].add(choice)
    return {
        "status": 200,
        "choices": {index: choice.shape() for index, choice in choices.items()},
        "usage": _usage(chunks[-1]["usage"]),
    }


class _Streamed:
    """One choice of a stream."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = defaultdict(str)
        self.calls: dict[int, dict[str, str]] = {}
        self.logprobs: list[dict[str, Any]] = []
        self.end: dict[str, Any] = {}

    def add(self, choice: dict[str, Any]) -> None:
        assert not self.end, "nothing follows a finish_reason"
        delta = choice.get("delta", {"content": choice.get("text")})
        for name in ("content", "reasoning"):
            self.texts[name] += delta.get(name) or ""
        for call in delta.get("tool_calls") or ():
            if call.get("id"):
                assert call["index"] == len(self.calls)
                assert call["id"].startswith(CALL_ID_PREFIXES)
                assert call["type"] == "function"
                self.calls[call["index"]] = {"name": call["function"]["name"], "arguments": ""}
            self.calls[call["index"]]["arguments"] += call["function"].get("arguments") or ""
        if choice.get("logprobs"):
            self.logprobs.append(choice["logprobs"])
        if choice.get("finish_reason"):
            self.end = {name: choice.get(name) for name in ("finish_reason", "stop_reason")}

    def shape(self) -> Answer:
        logprobs: dict[str, Any] = defaultdict(list)
        for part in self.logprobs:
            for name, values in part.items():
                logprobs[name] += values or []
        return {
            "content": self.texts["content"] or None,
            "reasoning": self.texts["reasoning"] or None,
            "tool_calls": [self.calls[index] for index in sorted(self.calls)],
            "logprobs": _logprobs(logprobs or None),
            **self.end,
        }


def _logprobs(logprobs: dict[str, Any] | None) -> Any:
    """Without what is empty, and rounded: the two servers may batch a prompt differently."""
    if not logprobs:
        return None
    _forget_parts(logprobs.get("content") or [])
    for alternatives in logprobs.get("top_logprobs") or ():
        for name in [name for name in alternatives if not name or name.startswith("bytes:")]:
            del alternatives[name]
    return _rounded({name: value for name, value in logprobs.items() if value})


def _prompt_logprobs(entries: list[dict[str, Any] | None] | None) -> Any:
    """Without the texts of tokens that are parts of characters, which vLLM shows with the next token's."""
    for entry in entries or ():
        for token in (entry or {}).values():
            if not token["decoded_token"].isascii():
                token["decoded_token"] = ""
    return _rounded(entries)


def _forget_parts(entries: list[dict[str, Any]]) -> None:
    """What tokens are called that are parts of a character. vLLM shows nothing of them, and then the whole
    character with its last one and that one's alternatives; Penstock shows each one's bytes, as OpenAI."""
    completes = False
    for entry in entries:
        completed, completes = completes, not entry["bytes"]
        for token in (entry, *entry["top_logprobs"]):
            if completed or not token["bytes"] or token["token"] == "\N{REPLACEMENT CHARACTER}":
                token["token"], token["bytes"] = "", []


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return value


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    details = usage.get("completion_tokens_details") or {}
    counts = {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    return {**counts, "reasoning_tokens": details.get("reasoning_tokens")}
