"""What vLLM's core process says of a request in one step, in Penstock's terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from penstock.errors import ProtocolError
from penstock.shapes import MAX_LOGPROB, FinishReason, TokenLogprob

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.outputs import LogprobsLists

REASONS = {
    "stop": FinishReason.STOP,
    "repetition": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "abort": FinishReason.ERROR,  # what we abort is forgotten at once: this is vLLM's own
    "error": FinishReason.ERROR,
}
"""By vLLM's names."""


def finish_reason(output: EngineCoreOutput) -> FinishReason | None:
    """None while the request goes on."""
    return None if output.finish_reason is None else REASONS[str(output.finish_reason)]


def check_tokens(token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises ProtocolError for a token that the model does not have: no frontend would take it."""
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        raise ProtocolError(f"new_token_ids: {list(token_ids)[:8]}, in a vocabulary of {vocab_size}")


def token_logprobs(lists: LogprobsLists, asked: int) -> list[TokenLogprob]:
    """One per new token.

    Args:
        lists: shapes (tokens, k + 1) with k at least `asked`: the chosen token, then the most likely ones.
        asked: how many alternatives the request wanted.

    Raises ProtocolError for values that are no numbers.
    """
    if not (lists.logprobs <= MAX_LOGPROB).all():
        raise ProtocolError("new_logprobs: not numbers, or out of range")
    return [
        TokenLogprob(token_ids[0], values[0], list(zip(token_ids[1:end], values[1:end], strict=True)))
        for end in (asked + 1,)
        for token_ids, values in zip(lists.logprob_token_ids.tolist(), lists.logprobs.tolist(), strict=True)
    ]
