"""Sampling in vLLM's terms."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from penstock.engines.vllm.inside.forced import REPLAY_ARG
from penstock.shapes import JsonObject, Sampling, StructuredOutput

GREEDY_BELOW = 1e-5
"""vLLM samples greedily below this temperature."""

ANY_OBJECT = '{"type": "object"}'


def sampling_params(
    sampling: Sampling,
    replay: Sequence[int] = (),
    transfer: JsonObject | None = None,
    *,
    seeded: bool = True,
) -> SamplingParams:
    """vLLM's parameters for one request.

    Args:
        replay: the tokens to which the beginning of the output is held.
        transfer: kv_transfer_params, for engines that hand over or take over.
        seeded: whether it matters which tokens are drawn. vLLM draws for seeded requests one by one.

    Raises vLLM's VLLMValidationError, or ValueError, for what vLLM would not take.
    """
    if sampling.logprob_token_ids:  # vLLM would give them to all requests of the same step
        raise ValueError(
            "`logprob_token_ids` is not supported by vLLM without changing other requests' answers"
        )
    extra: dict[str, Any] = {}
    if replay:
        extra[REPLAY_ARG] = list(replay)
    if transfer is not None:
        extra["kv_transfer_params"] = transfer
    params = SamplingParams(
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed if seeded and sampling.temperature >= GREEDY_BELOW else None,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=sampling.logit_bias or None,
        stop_token_ids=list(sampling.stop_token_ids) or None,
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
        thinking_token_budget=sampling.thinking_budget,
        allowed_token_ids=list(sampling.allowed_token_ids) or None,
        structured_outputs=None if sampling.structured is None else _structured(sampling.structured),
        extra_args=extra or None,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        skip_clone=True,  # it is this request's own
    )
    if sampling.bad_words:  # as vLLM's own tokenizer would set it
        params._bad_words_token_ids = [list(word) for word in sampling.bad_words]
    return params


def _structured(wanted: StructuredOutput) -> StructuredOutputsParams:
    if wanted.whitespace_pattern:
        raise ValueError("`structured_outputs.whitespace_pattern` is not supported by vLLM")
    if wanted.disable_any_whitespace:
        return StructuredOutputsParams(grammar=_compact_grammar(wanted.spec or ANY_OBJECT))
    match wanted.kind:
        case "json_object":
            return StructuredOutputsParams(json_object=True)
        case "choice":
            return StructuredOutputsParams(choice=json.loads(wanted.spec))
        case kind:
            return StructuredOutputsParams(**{kind: wanted.spec})


def _compact_grammar(schema: str) -> str:
    """A grammar of this schema's JSON, without white space. vLLM has only a flag of its server for that,
    which makes xgrammar compile schemas so. Raises ValueError for what xgrammar cannot compile."""
    import xgrammar
    from vllm.v1.structured_output.backend_xgrammar import has_xgrammar_unsupported_json_features

    if has_xgrammar_unsupported_json_features(json.loads(schema)):
        raise ValueError(
            "`structured_outputs.disable_any_whitespace`: xgrammar does not know all of the schema"
        )
    try:
        return str(xgrammar.Grammar.from_json_schema(schema, any_whitespace=False, separators=(",", ":")))
    except RuntimeError as error:
        raise ValueError(f"`structured_outputs.json`: {error}") from error
