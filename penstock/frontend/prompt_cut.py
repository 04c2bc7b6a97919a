"""`truncate_prompt_tokens`: prompts that are too long lose tokens at one end, as in vLLM."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from penstock.errors import RequestRejected
from penstock.shapes import ModelCard

FIELD: Final = "truncate_prompt_tokens"

Side = Literal["left", "right"]


class PromptCut(msgspec.Struct, frozen=True):
    """How much of each prompt of a call is kept."""

    tokens: int
    """-1: as many as the model's context holds beside one token of answer."""

    side: Side | None = None
    """Where tokens are left out. None: at the left, but after the tokens that the tokenizer puts there."""

    def kept_tokens(self, model: ModelCard) -> int:
        """Most tokens that a prompt keeps. Raises RequestRejected for more than the context holds."""
        limit = model.max_model_len
        if self.tokens > limit:
            message = f"`{FIELD}` is {self.tokens}, more than the model's whole context of {limit} tokens."
            raise RequestRejected(message, field=FIELD)
        return limit - 1 if self.tokens == -1 else self.tokens

    def of_text(self, text: str, limit: int) -> str:
        """At most this many characters of a text, which is not tokenized further than that."""
        return text[:limit] if self.side == "right" else text[-limit:]

    def of_tokens(self, token_ids: list[int], kept: int, prefix: int) -> list[int]:
        """At most `kept` of the tokens, of which the first `prefix` are the tokenizer's own."""
        dropped = len(token_ids) - kept
        if dropped <= 0:
            return token_ids
        if self.side == "right":
            return token_ids[:kept]
        start = min(prefix, kept) if self.side is None else 0
        return token_ids[:start] + token_ids[start + dropped :]
