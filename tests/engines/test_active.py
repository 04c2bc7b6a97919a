"""What of an attempt only an engine can refuse: it ends that attempt, never a batch with others."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from penstock.engines.active import fault
from penstock.shapes import Attempt, EngineCard, ModelCard, Sampling

CARD = EngineCard("e", ModelCard("m", max_model_len=100, vocab_size=50), 16, 10)
ATTEMPT = Attempt("a.1", "a", [1, 2, 49], 2, Sampling(4, stop_token_ids=(0, 49), logit_bias={49: 1.0}))


def test_an_attempt_that_can_be_served() -> None:
    assert fault(ATTEMPT, CARD) is None


@pytest.mark.parametrize(
    ("fields", "sampling", "reason"),
    [
        ({"token_ids": [1, 50]}, {}, "token id 50"),
        ({"token_ids": [1, -1]}, {}, "token id -1"),
        ({"token_ids": []}, {}, "empty"),
        ({"prompt_len": 0}, {}, "empty"),
        ({"prompt_len": 4}, {}, "prompt_len is 4"),
        ({"token_ids": [1] * 100, "prompt_len": 100}, {}, "at most 99"),
        ({"prefill_only": True}, {}, "no KV transfer"),
        ({}, {"max_tokens": 0}, "max_tokens is 0"),
        ({}, {"stop_token_ids": (50,)}, "stop_token_ids"),
        ({}, {"logit_bias": {50: 1.0}}, "logit_bias"),
        ({}, {"logit_bias": {-1: 1.0}}, "logit_bias"),
    ],
)
def test_why_it_cannot_be(fields: dict[str, Any], sampling: dict[str, Any], reason: str) -> None:
    asked = replace(ATTEMPT, **fields, sampling=replace(ATTEMPT.sampling, **sampling))
    assert reason in (fault(asked, CARD) or "")
