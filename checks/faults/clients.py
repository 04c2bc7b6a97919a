"""Clients that check every answer, token by token, and say how their request ended."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from xxhash import xxh3_64_intdigest

from checks.faults.http import Answer, Cut, request
from penstock.engines.byte_tokenizer import PRINTABLE

PATIENCE_S = 90.0
"""A request without an end after this long is hung: every deadline that can be reached here is shorter."""

_AGAIN_S = 0.2  # before asking another frontend


class Wrong(Exception):
    """The answer is not what it must be."""


def drawn(seed: int, count: int) -> str:
    """What the sim engine says: a function of seed and position, one character a token."""
    draws = (xxh3_64_intdigest(at.to_bytes(8, "little"), seed) >> 32 for at in range(count))
    return "".join(chr(PRINTABLE[draw % len(PRINTABLE)]) for draw in draws)


@dataclass(frozen=True)
class Question:
    """A request, and the text of each choice when it is known."""

    prompt: str
    max_tokens: int
    seed: int = 0
    model: str = "sim"
    n: int = 1
    chat: bool = False
    stream: bool = True
    logprobs: bool = False
    greedy: bool = False
    to_the_end: bool = False  # whatever the model would say
    expected: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    @property
    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "max_tokens": self.max_tokens, "n": self.n}
        body |= {"temperature": 0} if self.greedy else {"temperature": 1, "seed": self.seed}
        if self.chat:
            body["messages"] = [{"role": "user", "content": self.prompt}]
        else:
            body["prompt"] = self.prompt
        if self.to_the_end:
            body["ignore_eos"] = True
        if self.logprobs:
            body |= {"logprobs": True, "top_logprobs": 1} if self.chat else {"logprobs": 1}
        if self.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body


def sim_question(number: int, prompt_chars: int, max_tokens: int) -> Question:
    """One of several shapes, so that each is hurt by every fault."""
    seed = 7919 * number + 1
    n = 2 if number % 5 == 1 else 1
    return Question(
        prompt=f"{number:08d} ".ljust(prompt_chars, "abcdefghij"[number % 10]),
        max_tokens=max_tokens,
        seed=seed,
        n=n,
        chat=number % 2 == 0,
        stream=number % 7 != 3,
        logprobs=number % 5 == 2,
        expected=tuple(drawn(seed + choice, max_tokens) for choice in range(n)),
    )


@dataclass
class Outcome:
    """How a request ended: ok, wrong, lost, hung, or an error with its code."""

    kind: str = ""
    detail: str = ""
    cuts: int = 0  # connections that ended before the answer
    refusals: int = 0  # frontends that were not there, or leaving
    worst_gap_s: float = 0.0  # the longest wait for more, the first included; of streams
    began: float = 0.0
    took_s: float = 0.0
    texts: list[str] = field(default_factory=list)
    pieces: int = 0  # parts with text so far


class Client:
    """Asks one question until it is answered, as behind a balancer: a frontend that is gone, or says that
    it is leaving, is passed over for the next."""

    def __init__(self, question: Question, urls: Sequence[str], first: int) -> None:
        self.question = question
        self.outcome = Outcome()
        self.done = False
        self._urls = urls
        self._at = first
        self._last = 0.0

    @property
    def answering(self) -> bool:
        return self.outcome.pieces > 0

    async def run(self) -> Outcome:
        outcome = self.outcome
        outcome.began = time.monotonic()
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not await self._try():
                    self._at += 1
                    await asyncio.sleep(_AGAIN_S)
        except TimeoutError:
            outcome.kind, outcome.detail = "hung", f"{outcome.pieces} parts in {PATIENCE_S:g} s"
        except (Wrong, ValueError, LookupError, TypeError) as error:
            outcome.kind, outcome.detail = "wrong", repr(error)
        outcome.took_s = time.monotonic() - outcome.began
        self.done = True
        return outcome

    async def _try(self) -> bool:
        """Whether this was the end of it."""
        outcome, question = self.outcome, self.question
        outcome.texts = [""] * question.n
        outcome.pieces = 0
        self._last = time.monotonic()
        if not self._urls:
            outcome.refusals += 1
            return False
        try:
            async with request(
                self._urls[self._at % len(self._urls)] + question.path, question.body
            ) as answer:
                if answer.status != 200:
                    return self._refused(answer.status, await answer.body())
                await (self._stream(answer) if question.stream else self._whole(answer))
        except Cut:
            outcome.cuts += 1
            return False
        except OSError:
            outcome.refusals += 1
            return False
        return True

    def _refused(self, status: int, body: bytes) -> bool:
        code = str(json.loads(body)["error"]["code"])
        if status == 503 and code == "shutting_down":
            self.outcome.refusals += 1
            return False
        self.outcome.kind, self.outcome.detail = f"{status} {code}", body.decode()[:300]
        return True

    async def _whole(self, answer: Answer) -> None:
        body = json.loads(await answer.body())
        for choice in body["choices"]:
            text = choice["message"]["content"] if self.question.chat else choice["text"]
            self._add(choice["index"], text)
            self._finish(choice)
        self._usage(body["usage"])

    async def _stream(self, answer: Answer) -> None:
        rest, finished, used = b"", 0, False
        async for chunk in answer.chunks():
            *events, rest = (rest + chunk).split(b"\n\n")
            for event in events:
                content = event.removeprefix(b"data: ")
                if content == b"[DONE]":
                    if finished != self.question.n or not used:
                        raise Wrong(f"{finished} choices finished, usage {used}")
                    self.outcome.kind = "ok"
                    continue
                part = json.loads(content)
                if "error" in part:
                    self.outcome.kind = f"in the stream: {part['error']['code']}"
                    self.outcome.detail = content.decode()[:300]
                    return
                finished += self._part(part)
                if part.get("usage"):
                    self._usage(part["usage"])
                    used = True
        if not self.outcome.kind:
            raise Cut("the stream ended without [DONE]")

    def _part(self, part: dict[str, Any]) -> int:
        """How many choices it ends."""
        now = time.monotonic()
        self.outcome.worst_gap_s = max(self.outcome.worst_gap_s, now - self._last)
        self._last = now
        finished = 0
        for choice in part["choices"]:
            text = choice["delta"].get("content") or "" if self.question.chat else choice["text"]
            if text:
                self._add(choice["index"], text)
            if choice.get("finish_reason"):
                self._finish(choice)
                finished += 1
        return finished

    def _add(self, index: int, text: str) -> None:
        outcome, expected = self.outcome, self.question.expected
        at = len(outcome.texts[index])
        outcome.texts[index] += text
        outcome.pieces += 1
        if expected and not expected[index].startswith(text, at):
            raise Wrong(f"choice {index} at {at}: {text!r}, not {expected[index][at : at + len(text)]!r}")

    def _finish(self, choice: dict[str, Any]) -> None:
        index, expected = choice["index"], self.question.expected
        if expected and self.outcome.texts[index] != expected[index]:
            raise Wrong(f"choice {index} ends after {len(self.outcome.texts[index])} characters")
        if choice["finish_reason"] != "length":
            raise Wrong(f"finish_reason {choice['finish_reason']}")

    def _usage(self, usage: dict[str, Any]) -> None:
        wanted = self.question.max_tokens * self.question.n
        if usage["completion_tokens"] != wanted:
            raise Wrong(f"usage: {usage['completion_tokens']} tokens, not {wanted}")
        if not self.question.stream:
            self.outcome.kind = "ok"
