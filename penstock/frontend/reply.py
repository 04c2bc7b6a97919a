"""One chat answer of a model whose reasoning and tool calls are taken out of its text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from penstock.ports import AnswerParser, CallParser
from penstock.shapes import FinishReason, Parsed, StructuredOutput

TOOL_CALLS: Final = "tool_calls"  # OpenAI's finish_reason for an answer that calls tools


class Reply:
    """Feed it text with its tokens, take from it what that comes to.

    A stream is parsed step by step, any other answer once in the end, as vLLM does it: its parsers may see
    more in a whole answer than in its parts.
    """

    __slots__ = ("_auto", "_called", "_news", "_parser", "_required", "_stream", "_texts", "_token_ids")

    def __init__(self, parser: AnswerParser, *, stream: bool, required: bool, auto: bool) -> None:
        """`required`: the answer must call a tool; `auto`: the model decides whether it does."""
        self._parser = parser
        self._stream = stream
        self._required = required
        self._auto = auto
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._news: list[Parsed] = []
        self._called = False

    def add(self, text: str, token_ids: Sequence[int], *, finished: bool) -> None:
        """Raises RequestRejected(INTERNAL) when the parser fails."""
        self._token_ids += token_ids
        if not self._stream:
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
        stopped = reason is FinishReason.STOP
        if self._stream:
            tools = self._called and stopped and (self._auto or self._required)
        else:
            tools = (self._called and self._auto) or (self._required and stopped)
        return TOOL_CALLS if tools else str(reason)

    @property
    def reasoning_tokens(self) -> int:
        return self._parser.reasoning_tokens(self._token_ids)


class Replies:
    """The replies to one chat request.

    Args:
        parser: of the request.
        stream, required, auto: as for Reply.
        show_tokens: whether single tokens may be shown, also those of the reasoning.
    """

    def __init__(
        self, parser: CallParser, *, stream: bool, required: bool, auto: bool, show_tokens: bool
    ) -> None:
        self.show_tokens = show_tokens
        self._parser = parser
        self._options = {"stream": stream, "required": required, "auto": auto}
        self.show_special_tokens = not parser.skip_special_tokens

    def structured(self, prompt: Sequence[int]) -> StructuredOutput | None:
        """What an answer to this prompt must look like, tool calls included."""
        return self._parser.structured(prompt)

    def begin(self, prompt: Sequence[int]) -> Reply:
        """For one answer to this prompt."""
        return Reply(self._parser.answer(prompt), **self._options)
