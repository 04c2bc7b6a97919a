"""One chat answer of a model whose reasoning and tool calls are taken out of its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final, Literal

from penstock.ports import CallParser
from penstock.shapes import FinishReason, Parsed, ToolCallDelta

TOOL_CALLS: Final = "tool_calls"  # OpenAI's finish_reason for an answer that calls tools


def joined(parts: Sequence[Parsed]) -> Parsed:
    """The parts of an answer as one, with the deltas of each call made into one."""
    calls: dict[int, ToolCallDelta] = {}
    for part in parts:
        for delta in part.tool_calls:
            call = calls.setdefault(delta.index, ToolCallDelta(delta.index, arguments=""))
            call.id, call.name = delta.id or call.id, delta.name or call.name
            call.arguments = (call.arguments or "") + (delta.arguments or "")
    content = [part.content for part in parts if part.content is not None]
    reasoning = [part.reasoning for part in parts if part.reasoning is not None]
    return Parsed("".join(content) or None, "".join(reasoning) or None, list(calls.values()))


def text_alone(part: Parsed) -> str | None:
    """The content, where there is nothing else: nearly each part of a stream."""
    return part.content if part.reasoning is None and not part.tool_calls else None


def _only(part: Parsed) -> Literal["content", "reasoning"] | None:
    """The one kind of text that the part has and nothing else."""
    if part.tool_calls or (part.content is None) is (part.reasoning is None):
        return None
    return "reasoning" if part.content is None else "content"


def _joined(parts: Sequence[Parsed]) -> list[Parsed]:
    """The parts in their order; neighbours that are text of one kind are one part."""
    joined: list[Parsed] = []
    for kind, group in groupby(parts, key=_only):
        if kind is None:
            joined += group
        else:
            text = "".join([getattr(part, kind) for part in group])
            joined.append(Parsed(content=text) if kind == "content" else Parsed(reasoning=text))
    return joined


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
    more in a whole answer than in its parts. Of an answer that was cut they see less, as they leave a call
    that is not complete in the text, or out. A stream has given out such a call when it is cut, so there a
    whole answer is read in its steps, as a stream is. So is one that had to call a tool, where the model
    broke off its call.
    """

    __slots__ = ("_called", "_news", "_parser", "_prompt", "_rules", "_steps", "_token_ids")

    def __init__(self, rules: ReplyRules, prompt: Sequence[int]) -> None:
        self._rules = rules
        self._prompt = prompt
        self._parser = rules.parser.answer(prompt)
        self._steps: list[tuple[str, Sequence[int], bool]] = []  # text, tokens, whether it was the last
        self._token_ids: list[int] = []
        self._news: list[Parsed] = []
        self._called = False

    def add(self, text: str, token_ids: Sequence[int], *, finished: bool) -> None:
        """Raises RequestRejected(INTERNAL) when the parser fails."""
        self._token_ids += token_ids
        if not self._rules.stream:
            self._steps.append((text, token_ids, finished))
            return
        parsed = self._parser.push(text, token_ids, finished=finished)
        if parsed is not None:
            self._called = self._called or bool(parsed.tool_calls)
            self._news.append(parsed)

    def take(self) -> list[Parsed]:
        """What is new in a stream. A client that reads more slowly than the model writes gets the text of
        several steps as one, so that log-probabilities come with the text that they belong to."""
        news, self._news = self._news, []
        return news if len(news) < 2 else _joined(news)

    def whole(self, *, cut: bool) -> Parsed:
        """An answer that is not streamed. `cut`: the model had not ended it. Raises
        RequestRejected(INTERNAL) when the parser fails."""
        if not cut:
            parsed = self._parser.whole("".join(text for text, _, _ in self._steps), self._token_ids)
            if self._rules.required and not parsed.tool_calls:
                self._parser, cut = self._rules.parser.answer(self._prompt), True
        if cut:
            news = (self._parser.push(text, ids, finished=last) for text, ids, last in self._steps)
            parsed = joined([new for new in news if new is not None])
        self._called = bool(parsed.tool_calls)
        return parsed

    def finish_name(self, reason: FinishReason) -> str:
        """OpenAI's finish_reason, once the last of the answer was taken. A call of the one tool that was
        chosen by name is no decision of the model's, so that its end stays `stop`."""
        decided = self._called and (self._rules.auto or self._rules.required)
        return TOOL_CALLS if decided and reason is FinishReason.STOP else str(reason)

    @property
    def reasoning_tokens(self) -> int:
        return self._parser.reasoning_tokens(self._token_ids)
