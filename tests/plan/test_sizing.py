"""Looking for the fewest workers."""

from __future__ import annotations

import pytest

from penstock.plan.candidates import Form
from penstock.plan.kinds import worker_kinds
from penstock.plan.sizing import Sizing

(KIND,) = worker_kinds("qwen3-32b/h200/tp2")


@pytest.mark.parametrize("needed", [1, 2, 3, 4, 5, 17, 100])
@pytest.mark.parametrize("start", [1, 4, 20])
@pytest.mark.parametrize("growth", [1.1, 2.0])
def test_the_fewest_workers_are_found(needed: int, start: int, growth: float) -> None:
    sizing, tried = Sizing(Form(KIND), start, growth), []
    while (workers := sizing.next(512)) is not None:
        tried.append(workers)
        sizing.add(workers, workers >= needed)
    assert sizing.fewest == needed
    assert len(tried) == len(set(tried))


def test_no_more_gpus_are_tried_than_allowed() -> None:
    sizing, tried = Sizing(Form(KIND), 4, 2.0), []
    while (workers := sizing.next(50)) is not None:
        tried.append(workers)
        sizing.add(workers, False)
    assert (tried, sizing.fewest) == ([4, 8, 16], None)


def test_a_start_that_is_too_large_is_replaced_by_the_least() -> None:
    assert Sizing(Form(KIND), 4, 2.0).next(6) == 1
    assert Sizing(Form(KIND, 0.5), 1, 2.0).next(512) == 2
