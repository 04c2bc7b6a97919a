"""One chat answer of a model whose reasoning and tool calls are taken out of its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from penstock.ports import CallParser
from penstock.shapes import FinishReason, Parsed

TOOL_CALLS: Final = "tool_calls"  # OpenAI's finish_reason for an answer that calls tools


@dataclass(frozen=True, slots=True)
class ReplyRules:
    """How the replies to one chat request are read."""

    parser: CallParser
    stream: bool
    required: bool  # an answer must call a tool
    auto: bool  # the model decides whether it does
    show_tokens: bool  # single tokens may be shown, also those of the reasoning


class Reply:
    """`add` takes text with its tokens, `take` or `whole` gives what the model's parser makes of it.

    A stream is parsed step by step, any other answer once in the end, as vLLM does it: its parsers may see
    more in a whole answer than in its parts.
    """

    __slots__ = ("_called", "_news", "_parser", "_rules", "_texts", "_token_ids")

    def __init__(self, rules: ReplyRules, prompt: Sequence[int]) -> None:
        self._rules = rules
        self._parser = rules.parser.answer(prompt)
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._news: list[Parsed] = []
        self._called = False

    def add(self, text: str, token_ids: Sequence[int], *, finished: bool) -> None:
        """Raises RequestRejected(INTERNAL) when the parser fails."""
        self._token_ids += token_ids
        if not self._rules.stream:
            self._texts.append(text)
            return
        parsed = self._parser.push(text, token_ids, finished=finished)
        if parsed is not None:
            self._called = self._called or bool(parsed.tool_calls)
            self._news.append(parsed)

    def take(self) -> list[Parsed]:
        """What is new in a stream."""
        news, self._news = self._news, []
        return news

    def whole(self) -> Parsed:
        """An answer that is not streamed. Raises RequestRejected(INTERNAL) when the parser fails."""
        parsed = self._parser.whole("".join(self._texts), self._token_ids)
        self._called = bool(parsed.tool_calls)
        return parsed

    def finish_name(self, reason: FinishReason) -> str:
        """OpenAI's finish_reason, once the last of the answer was taken. A call of the one tool that was
        chosen by name is no decision of the model's, so that its end stays `stop`."""
        rules, stopped = self._rules, reason is FinishReason.STOP
        if rules.stream:
            tools = self._called and stopped and (rules.auto or rules.required)
        else:
            tools = (self._called and rules.auto) or (rules.required and stopped)
        return TOOL_CALLS if tools else str(reason)

    @property
    def reasoning_tokens(self) -> int:
        return self._parser.reasoning_tokens(self._token_ids)
