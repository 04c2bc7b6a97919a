"""One timing for both: a cost model of Penstock's, and the same as Dynamo's mocker reads it.

The mocker looks a step up in two tables, one over the new prompt tokens and one over the context of the
decoding requests, together and each (its `predict_prefill_time` and `predict_decode_time`), and adds both.
So it can take Penstock's formula without attention (c2 = 0), but adds what reading the weights takes where
Penstock takes the longer of the two: COMMON has no such part while decoding, and is the same in both.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from penstock.engines.cost_models import CostModel, MeasuredCosts, cost_model

COMMON = CostModel(c0=8.0, c1=0.1, a1=2.0)
"""A step takes 8 ms and 0.1 ms a token for prompts, and 2 ms for each request that decodes."""

PACE = cost_model("qwen3-8b/h200/tp1")
"""An H200's: 5 to 6 ms a step. The two differ in steps that compute prompts beside decoding requests."""

MAX_CONTEXT = 65_536
MAX_CONTEXT_OF_ALL = 1 << 24
CONTEXT_RATIO = 1.02
"""Between two contexts of the table. Between entries the mocker is linear, and 1 / context is not: this
makes it 0.005 % too much."""


def write_penstock(costs: CostModel, file: Path) -> None:
    """For `--sim-cost-model`."""
    measured = MeasuredCosts(costs, "bench", gpus=1, cache_tokens=0, ttft_error=0.0, itl_error=0.0)
    file.write_bytes(msgspec.json.encode(measured))


def write_mocker(costs: CostModel, file: Path) -> None:
    """For `--planner-profile-data`, an .npz file."""
    steps = int(np.log(MAX_CONTEXT) / np.log(CONTEXT_RATIO)) + 2
    context = np.power(CONTEXT_RATIO, np.arange(steps, dtype=np.float64))
    of_all = np.array([0.0, MAX_CONTEXT_OF_ALL], dtype=np.float64)
    prompts = np.array([0.0, MAX_CONTEXT], dtype=np.float64)
    np.savez(
        file,
        prefill_isl=prompts,
        prefill_ttft_ms=costs.c0 + costs.c1 * prompts,
        decode_active_kv_tokens=of_all,
        decode_context_length=context,
        decode_itl=costs.a0 + costs.a1 * of_all[:, None] / context + costs.a2 * of_all[:, None],
    )
