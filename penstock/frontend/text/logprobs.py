"""Log-probabilities in the two shapes that OpenAI's API has for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from penstock.shapes import JsonObject, PromptLogprob, TokenLogprob

LEAST_LOGPROB = -9999.0  # JSON has no infinity; what OpenAI documents for a token that is ruled out

NO_LOGPROB = math.nan  # of a prompt's first token, which follows nothing

TokenBytes = Callable[[int], bytes]  # what a token id stands for


def prompt_entries(
    tokens: Sequence[PromptLogprob], token_bytes: TokenBytes, top: int
) -> list[dict[int, JsonObject]]:
    """vLLM's shape of `prompt_logprobs`: for each token an object with its own id and those of as many
    alternatives."""
    return [
        {
            token_id: {
                "logprob": max(logprob, LEAST_LOGPROB),
                "rank": rank,
                "decoded_token": token_bytes(token_id).decode("utf-8", "replace"),
            }
            for token_id, logprob, rank in (
                (token.token_id, token.logprob, token.rank),
                *((*pair, place) for place, pair in enumerate(token.top[:top], 1)),
            )
        }
        for token in tokens
    ]


class LogprobFormat(Protocol):
    """One answer's log-probabilities, as JSON."""

    def render(self, tokens: Sequence[TokenLogprob]) -> JsonObject:
        """The next tokens of the answer."""


class ChatLogprobs:
    """`{"content": [{"token", "logprob", "bytes", "top_logprobs"}]}`."""

    def __init__(self, token_bytes: TokenBytes, top: int) -> None:
        self._token_bytes = token_bytes
        self._top = top

    def render(self, tokens: Sequence[TokenLogprob]) -> JsonObject:
        content = []
        for token in tokens:
            entry = self._entry(token.token_id, token.logprob)
            entry["top_logprobs"] = [self._entry(*pair) for pair in token.top[: self._top]]
            content.append(entry)
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> JsonObject:
        piece = self._token_bytes(token_id)
        return {
            "token": piece.decode("utf-8", "replace"),
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": list(piece),
        }


class CompletionLogprobs:
    """`{"tokens", "token_logprobs", "top_logprobs", "text_offset"}`, one list each.

    Alternatives are keyed by text here, so a token that is part of a character is written as its bytes
    (`bytes:\\xe4\\xbd`, as OpenAI does): the keys stay apart.
    """

    def __init__(self, token_bytes: TokenBytes, top: int) -> None:
        self._token_bytes = token_bytes
        self._top = top
        self._offset = 0  # in characters of the answer, as far as its tokens are whole

    def render(self, tokens: Sequence[TokenLogprob]) -> JsonObject:
        offsets: list[int] = []
        names: list[str] = []
        logprobs: list[float | None] = []
        alternatives: list[dict[str, float] | None] = []
        for token in tokens:
            name = self._name(token.token_id)
            offsets.append(self._offset)
            names.append(name)
            if math.isnan(token.logprob):
                logprobs.append(None)
                alternatives.append(None)
            else:
                logprob = max(token.logprob, LEAST_LOGPROB)
                top = {name: logprob}  # it comes first, as in vLLM
                for other, value in token.top[: self._top]:
                    top.setdefault(self._name(other), max(value, LEAST_LOGPROB))
                logprobs.append(logprob)
                alternatives.append(top)
            self._offset += len(self._token_bytes(token.token_id).decode("utf-8", "ignore"))
        return {
            "tokens": names,
            "token_logprobs": logprobs,
            "top_logprobs": alternatives,
            "text_offset": offsets,
        }

    def _name(self, token_id: int) -> str:
        piece = self._token_bytes(token_id)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
