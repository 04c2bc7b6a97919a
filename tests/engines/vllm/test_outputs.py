"""What vLLM says of a request is checked before it is passed on: frontends would cut off its worker."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from penstock.engines.vllm.active_request import ActiveRequest
from penstock.engines.vllm.continuation import continuation
from penstock.engines.vllm.differences import core_error
from penstock.engines.vllm.metrics import CoreTimes
from penstock.engines.vllm.outputs import check_tokens, finish_reason, is_grammar_error, token_logprobs
from penstock.errors import ProtocolError
from penstock.shapes import Attempt, FinishReason, Sampling, StructuredOutput, TokenLogprob


def lists(values: list[list[float]]) -> Any:
    token_ids = [list(range(7, 7 + len(row))) for row in values]
    return SimpleNamespace(
        logprob_token_ids=np.array(token_ids, np.int32), logprobs=np.array(values, np.float32)
    )


@pytest.mark.parametrize(
    ("fields", "reason", "error"),
    [
        ({}, FinishReason.ERROR, ("", "")),  # before vLLM 0.33
        ({"error": None}, FinishReason.ERROR, ("", "")),
        ({"code": "engine_paused"}, FinishReason.ERROR, ("engine_paused", "why")),
        ({"code": "validation_error"}, FinishReason.REJECTED, ("validation_error", "why")),
    ],
)
def test_a_request_that_the_core_finds_wrong_is_rejected_and_any_other_error_is_the_engines(
    fields: dict[str, Any], reason: FinishReason, error: tuple[str, str]
) -> None:
    if "code" in fields:
        fields = {"error": SimpleNamespace(message="why", **fields)}
    output: Any = SimpleNamespace(finish_reason="error", **fields)
    assert finish_reason(output) is reason
    assert core_error(output) == error


REGEX = Sampling(max_tokens=5, structured=StructuredOutput("regex", "a"))


@pytest.mark.parametrize(
    ("sampling", "known", "given", "new", "is_grammar"),
    [
        (REGEX, 0, 0, 0, True),
        (Sampling(max_tokens=5), 0, 0, 0, False),
        (REGEX, 1, 0, 0, False),
        (REGEX, 0, 1, 0, False),
        (REGEX, 0, 0, 1, False),
    ],
)
def test_an_error_before_any_token_of_an_answer_with_a_grammar_is_the_grammars(
    sampling: Sampling, known: int, given: int, new: int, is_grammar: bool
) -> None:
    attempt = Attempt("a", "a", [5] * (3 + known), 3, sampling)
    active = ActiveRequest(attempt, "a", continuation(attempt, pulls=False), CoreTimes(0.0), given=given)
    output: Any = SimpleNamespace(finish_reason="error", new_token_ids=[7] * new)
    assert is_grammar_error(active, output) is is_grammar


def test_tokens_of_the_vocabulary_are_taken() -> None:
    check_tokens([], 50)
    check_tokens([0, 49], 50)


@pytest.mark.parametrize("token_ids", [[50], [3, -1], [2**40]])
def test_other_tokens_are_refused(token_ids: list[int]) -> None:
    with pytest.raises(ProtocolError, match="new_token_ids"):
        check_tokens(token_ids, 50)


def test_a_token_that_is_ruled_out_is_no_lie() -> None:
    (got,) = token_logprobs(lists([[-0.5, -math.inf]]), 1)
    assert got == TokenLogprob(7, -0.5, [(8, -math.inf)])


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e10])
def test_log_probabilities_that_are_no_numbers_are_refused(value: float) -> None:
    with pytest.raises(ProtocolError, match="new_logprobs"):
        token_logprobs(lists([[-0.5, value]]), 1)
