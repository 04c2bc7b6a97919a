"""What vLLM's core process says of a request in one step, in Penstock's terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from penstock.errors import ProtocolError
from penstock.shapes import MAX_LOGPROB, FinishReason, TokenLogprob

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.outputs import LogprobsLists, LogprobsTensors

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
    return _token_logprobs("new_logprobs", lists, asked)


def prompt_logprobs(output: EngineCoreOutput, asked: int | None) -> list[TokenLogprob] | None:
    """The same of a prompt's tokens, from its second one on; None where they are not in this output."""
    tensors = output.new_prompt_logprobs_tensors
    if tensors is None or asked is None:
        return None
    return _token_logprobs("new_prompt_logprobs_tensors", tensors, asked)


def _token_logprobs(field: str, rows: LogprobsLists | LogprobsTensors, asked: int) -> list[TokenLogprob]:
    if not (rows.logprobs <= MAX_LOGPROB).all():
        raise ProtocolError(f"{field}: not numbers, or out of range")
    return [
        TokenLogprob(token_ids[0], values[0], list(zip(token_ids[1:end], values[1:end], strict=True)))
        for end in (asked + 1,)
        for token_ids, values in zip(rows.logprob_token_ids.tolist(), rows.logprobs.tolist(), strict=True)
    ]
