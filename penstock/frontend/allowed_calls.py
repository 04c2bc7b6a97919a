"""Calls of the tools that a request allows, out of an answer of a model that is shown more of them.

With `tool_choice: allowed_tools` the prompt has all tools, so that requests which allow different ones
share its cached KV. Where an answer must call a tool, its grammar has the allowed ones only. Where the
model decides, nothing keeps it from calling another one: such a call is left out of the answer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from penstock.logs.quiet_log import QuietLog
from penstock.ports import AnswerParser, CallParser
from penstock.shapes import Parsed, StructuredOutput, ToolCallDelta

_log = QuietLog(logging.getLogger("penstock.frontend"))


class AllowedCallParser:
    """A CallParser over another one."""

    def __init__(self, parser: CallParser, names: frozenset[str]) -> None:
        self._parser = parser
        self._names = names
        self.skip_special_tokens = parser.skip_special_tokens

    def structured(self, prompt_ids: Sequence[int]) -> StructuredOutput | None:
        """As CallParser.structured."""
        return self._parser.structured(prompt_ids)

    def answer(self, prompt_ids: Sequence[int]) -> AllowedAnswerParser:
        """As CallParser.answer."""
        return AllowedAnswerParser(self._parser.answer(prompt_ids), self._names)


class AllowedAnswerParser:
    """An AnswerParser over another one."""

    def __init__(self, parser: AnswerParser, names: frozenset[str]) -> None:
        self._parser = parser
        self._names = names
        self._kept: dict[int, int] = {}  # the index of each call that is kept, by its index in all calls

    def push(self, text: str, token_ids: Sequence[int], *, finished: bool) -> Parsed | None:
        """As AnswerParser.push."""
        parsed = self._parser.push(text, token_ids, finished=finished)
        if parsed is None or not parsed.tool_calls:
            return parsed
        parsed.tool_calls = self._allowed(parsed.tool_calls)
        return parsed if parsed.content or parsed.reasoning or parsed.tool_calls else None

    def whole(self, text: str, token_ids: Sequence[int]) -> Parsed:
        """As AnswerParser.whole."""
        parsed = self._parser.whole(text, token_ids)
        parsed.tool_calls = self._allowed(parsed.tool_calls)
        return parsed

    def reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """As AnswerParser.reasoning_tokens."""
        return self._parser.reasoning_tokens(token_ids)

    def _allowed(self, deltas: Sequence[ToolCallDelta]) -> list[ToolCallDelta]:
        allowed = []
        for delta in deltas:
            if delta.name in self._names:
                self._kept.setdefault(delta.index, len(self._kept))
            elif delta.name is not None:
                _log.info("a call of a tool that its request does not allow is left out: %.80r", delta.name)
            if delta.index in self._kept:
                delta.index = self._kept[delta.index]
                allowed.append(delta)
        return allowed
