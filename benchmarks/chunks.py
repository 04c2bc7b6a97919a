"""CPU time of writing one delta of a stream as each API's event, in a tight loop.

A delta is five characters of text, as a token is; `parsed` ones are of a model whose workers name a parser,
whose own work is left out. The least of several rounds, in nanoseconds of this process.

    python benchmarks/chunks.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from penstock.frontend.anthropic_messages import Messages
from penstock.frontend.chat import ChatChunks, ReplyChunks
from penstock.frontend.completion_objects import Envelope
from penstock.frontend.endpoint import Beginning
from penstock.frontend.responses_api.create import ResponsesApi
from penstock.frontend.responses_api.memory_store import MemoryResponseStore
from penstock.frontend.text.tokenizing import Caller
from penstock.shapes import ModelCard, Parsed, Sampling

DELTAS = 20_000
ROUNDS = 15
TEXT = "word "


class GivenReply:
    """A reply whose parser has always found the same."""

    def __init__(self, parsed: Parsed) -> None:
        self._parsed = [parsed]

    def take(self) -> list[Parsed]:
        return list(self._parsed)


class GivenChoice:
    """What the writers of chunks need of a Choice, with the same text at each call."""

    index = 0
    finish_reason = None
    cached_tokens = output_tokens = 0
    shows_logprobs = False

    def __init__(self, parsed: Parsed | None) -> None:
        self.reply = GivenReply(parsed) if parsed is not None else None
        self.request = type("Given", (), {"token_ids": [1]})

    def take(self) -> tuple[str, list[Any]]:
        return TEXT if self.reply is None else "", []

    def take_token_ids(self) -> None:
        return None

    def render_logprobs(self, logprobs: list[Any]) -> None:
        return None


def streams() -> dict[str, Callable[[], Any]]:
    """Makers of each API's stream, by its name."""
    envelope = Envelope("chatcmpl-" + "0" * 32, "chat.completion.chunk", 1, "tiny", "fp_0123456789ab")
    card = ModelCard("tiny", max_model_len=2048, vocab_size=1000)
    responses = ResponsesApi(MemoryResponseStore(1, 1, 1.0))
    body = (
        b'{"model": "tiny", "input": "x", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}'
    )

    def beginning(call: Any, answer_id: str) -> Beginning:
        caller = Caller("", 0, 0.0, 60.0)
        none: Any = None
        return Beginning(
            answer_id=answer_id + "0" * 32,
            router_key="c",
            http_request_id="h",
            wanted=call.wanted,
            sampling=Sampling(max_tokens=1),
            model=card,
            revision="tiny-0123456789abcdef",
            text=none,
            caller=caller,
            default_max_tokens=1,
        )

    def responses_stream() -> Any:
        call = responses.decode(b'{"model": "tiny", "input": "x"}')
        return call.stream(beginning(call, "resp_"), [])

    def messages_stream() -> Any:
        call = Messages.decode(body)
        return call.stream(beginning(call, "msg_"), [])

    return {
        "chat": lambda: ChatChunks(envelope, 1, include_usage=False),
        "chat, parsed": lambda: ReplyChunks(envelope, 1, include_usage=False),
        "messages": messages_stream,
        "messages, parsed": messages_stream,
        "responses": responses_stream,
        "responses, parsed": responses_stream,
    }


def delta_ns(make: Callable[[], Any], choice: GivenChoice) -> float:
    """For one delta, in the round that took the least."""
    least = float("inf")
    for _ in range(ROUNDS):
        chunk = make().chunk
        chunk(choice)  # what is said once
        began = time.thread_time_ns()
        for _ in range(DELTAS):
            chunk(choice)
        least = min(least, (time.thread_time_ns() - began) / DELTAS)
    return least


def main() -> None:
    for name, make in streams().items():
        choice = GivenChoice(Parsed(content=TEXT) if name.endswith("parsed") else None)
        print(f"{name:<20} {delta_ns(make, choice):7.0f} ns")


if __name__ == "__main__":
    main()
