"""What is left to compute of a prompt: its tokens, and what their attention reads.

A new token attends to all that are before it. So `n` tokens behind `p` computed ones read
`n * (p + n / 2)`: the same number of tokens costs more at the end of a long prompt than at its beginning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class PromptWork(NamedTuple):
    """Of one prompt, or of several together."""

    tokens: int = 0
    context_tokens: int = 0  # over these tokens: how many are before each


NO_WORK = PromptWork()

USUAL_GAIN = 0.0025
"""Weight of the latest prompt among the usual ones, so that the last 400 or so count."""


@dataclass(slots=True)
class UsualPrompt:
    """What prompts leave to compute on average."""

    seen: int = 0
    tokens: float = 0.0
    context_tokens: float = 0.0

    def add(self, prompt: PromptWork) -> None:
        self.seen += 1
        gain = max(USUAL_GAIN, 1 / self.seen)
        self.tokens += gain * (prompt.tokens - self.tokens)
        self.context_tokens += gain * (prompt.context_tokens - self.context_tokens)

    @property
    def work(self) -> PromptWork:
        """Nothing before the first one."""
        return PromptWork(round(self.tokens), round(self.context_tokens))


def prompt_work(there: int, length: int) -> PromptWork:
    """Of a prompt of this length whose first `there` tokens have KV."""
    left = length - there
    return PromptWork(left, context_before(left, length))


def context_before(tokens: int, length: int) -> int:
    """How many are before each of the last so many tokens of a prompt of this length, added up."""
    return tokens * (2 * length - tokens) // 2


def part_of(work: PromptWork, tokens: int) -> PromptWork:
    """So many of these tokens, with their share of the context."""
    return PromptWork(tokens, work.context_tokens * tokens // work.tokens) if tokens else NO_WORK
