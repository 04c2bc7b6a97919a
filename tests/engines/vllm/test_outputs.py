"""What vLLM says of a request is checked before it is passed on: frontends would cut off its worker."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from penstock.engines.vllm.outputs import check_tokens, token_logprobs
from penstock.errors import ProtocolError
from penstock.shapes import TokenLogprob


def lists(values: list[list[float]]) -> Any:
    token_ids = [list(range(7, 7 + len(row))) for row in values]
    return SimpleNamespace(
        logprob_token_ids=np.array(token_ids, np.int32), logprobs=np.array(values, np.float32)
    )


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
