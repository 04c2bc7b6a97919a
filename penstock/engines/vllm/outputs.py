"""What vLLM's core process says of a request in one step, in Penstock's terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from penstock.engines.vllm.active_request import ActiveRequest
from penstock.engines.vllm.differences import core_error
from penstock.errors import ProtocolError
from penstock.shapes import MAX_LOGPROB, FinishReason, PromptLogprob, TokenLogprob

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

NO_GRAMMAR = "vLLM cannot compile this schema or grammar; the worker's log has vLLM's reason"


def finish_reason(output: EngineCoreOutput) -> FinishReason | None:
    """None while the request goes on."""
    if output.finish_reason is None:
        return None
    rejected = core_error(output)[0] == "validation_error"
    return FinishReason.REJECTED if rejected else REASONS[str(output.finish_reason)]


def is_grammar_error(active: ActiveRequest, output: EngineCoreOutput) -> bool:
    """Whether this end with an error means that the request's grammar cannot be compiled. Before 0.33 vLLM
    does not say so. But where KV that does not arrive is computed, no other error ends an answer without
    having given it a token. One that began elsewhere had a grammar that could be compiled."""
    attempt = active.attempt
    begins = len(attempt.token_ids) == attempt.prompt_len and not active.given
    return attempt.sampling.structured is not None and begins and not output.new_token_ids


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
    _check_numbers("new_logprobs", lists.logprobs)
    return [
        TokenLogprob(token_ids[0], values[0], list(zip(token_ids[1:end], values[1:end], strict=True)))
        for end in (asked + 1,)
        for token_ids, values in zip(lists.logprob_token_ids.tolist(), lists.logprobs.tolist(), strict=True)
    ]


def prompt_logprobs(output: EngineCoreOutput, asked: int | None) -> list[PromptLogprob] | None:
    """The same of a prompt's tokens, from its second one on; None where they are not in this output."""
    tensors = output.new_prompt_logprobs_tensors
    if tensors is None or asked is None:
        return None
    _check_numbers("new_prompt_logprobs_tensors", tensors.logprobs)
    token_lists, value_lists = tensors.logprob_token_ids.tolist(), tensors.logprobs.tolist()
    ranks, end = tensors.selected_token_ranks.tolist(), asked + 1
    return [
        PromptLogprob(tokens[0], values[0], list(zip(tokens[1:end], values[1:end], strict=True)), rank)
        for tokens, values, rank in zip(token_lists, value_lists, ranks, strict=True)
    ]


def _check_numbers(field: str, values: Any) -> None:
    """Values are an array of numpy or a tensor of torch. Raises ProtocolError."""
    if not (values <= MAX_LOGPROB).all():
        raise ProtocolError(f"{field}: not numbers, or out of range")
