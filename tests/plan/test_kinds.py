"""What fits on which GPUs."""

from __future__ import annotations

import pytest

from penstock.engines.cost_models import ZERO, cost_models
from penstock.errors import ConfigError
from penstock.plan.kinds import worker_kinds


def test_the_beginning_of_a_name_means_all_that_begin_so() -> None:
    names = [kind.cost_model for kind in worker_kinds("qwen3-32b/h200")]
    assert names == ["qwen3-32b/h200/tp1", "qwen3-32b/h200/tp2"]
    assert len(worker_kinds("qwen3-32b")) == 4, "not the one in FP8"
    assert [kind.gpus for kind in worker_kinds("qwen3-32b/h100/tp4, llama-3.1-8b/h100")] == [4, 1]


def test_the_kv_cache_is_as_large_as_measured() -> None:
    """vLLM reported 307,328 tokens for this model on two H100."""
    (kind,) = worker_kinds("qwen3-32b/h100/tp2")
    assert kind.cache_tokens == pytest.approx(307_328, rel=0.01)


def test_every_cost_model_can_be_planned_with() -> None:
    for name in cost_models().keys() - {ZERO}:
        (kind,) = worker_kinds(name)
        assert 100_000 < kind.cache_tokens < 3_000_000, name
        assert name.endswith(f"/tp{kind.gpus}")


@pytest.mark.parametrize(
    ("names", "error"),
    [("qwen3", "`qwen3` is none of"), ("zero", "`zero` is none of"), (" , ", "nothing is given")],
)
def test_what_is_wrong_is_named(names: str, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        worker_kinds(names)
