"""The runner's contract: one entry per row."""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.engines.batch import BatchRow
from penstock.engines.reference.runner import ReferenceRunner
from penstock.shapes import Sampling


def test_one_entry_per_row_and_none_without_sample(bench: Any, prompt: list[int]) -> None:
    asked = Sampling(max_tokens=1, temperature=0.0, logprobs=3)
    first, second, third = (bench.sequence(prompt, asked, room=0) for _ in range(3))
    rows = [
        BatchRow(first, 0, 5, False),
        BatchRow(second, 0, len(prompt), True),
        BatchRow(third, 0, 9, False),
    ]
    samples = ReferenceRunner(bench.model, ()).run(rows)
    assert [sample is None for sample in samples] == [True, False, True]
    assert samples[1] is not None
    logprob = samples[1].logprob
    assert logprob is not None
    assert logprob.top[0] == (logprob.token_id, logprob.logprob)
    logits = bench.logits(BatchRow(second, 0, len(prompt), True))[0].astype(np.float64)
    expected = logits.max() - np.log(np.exp(logits).sum())
    assert abs(logprob.logprob - expected) < 1e-5


def test_eos_is_held_back_until_min_tokens(bench: Any, prompt: list[int]) -> None:
    sequence = bench.sequence(prompt, room=0)
    best = ReferenceRunner(bench.model, ()).run([BatchRow(sequence, 0, len(prompt), True)])[0]
    assert best is not None
    sequence.sampling = Sampling(max_tokens=9, min_tokens=1, temperature=0.0)
    held = ReferenceRunner(bench.model, (best.token_id,)).run([BatchRow(sequence, 0, len(prompt), True)])[0]
    assert held is not None
    assert held.token_id != best.token_id
