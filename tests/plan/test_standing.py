"""Looking for a candidate's margin."""

from __future__ import annotations

import pytest

from penstock.plan.candidates import PlannedGraph
from penstock.plan.kinds import worker_kinds
from penstock.plan.standing import LEAST_SCALE, MOST_SCALE, Standing
from tests.plan.reports import report

(KIND,) = worker_kinds("qwen3-8b")
CANDIDATE = PlannedGraph(KIND, aggregated=2)


def searched(capacity: float, tolerance: float) -> Standing:
    """All requests are good up to this scale, and beyond it as many as at it."""
    standing = Standing(CANDIDATE, 0.9)
    while (scale := standing.next_scale(tolerance)) is not None:
        standing.add(scale, [report(min(1.0, capacity / scale))])
    return standing


@pytest.mark.parametrize("capacity", [0.3, 0.95, 1.0, 1.7, 3.0])
def test_the_margin_is_found_to_within_the_tolerance(capacity: float) -> None:
    standing = searched(capacity, 1.1)
    assert standing.margin == pytest.approx(capacity / 0.9, rel=0.1)
    assert len(standing.reports) <= 8
    assert standing.meets(1.0) == (capacity >= 0.9)


def test_what_never_fails_has_the_largest_margin_that_is_tried() -> None:
    standing = searched(1000.0, 1.1)
    assert (standing.margin, standing.high) == (MOST_SCALE, None)


def test_what_always_fails_has_no_margin() -> None:
    standing = searched(0.01, 1.1)
    assert (standing.margin, standing.low, standing.high) == (None, None, LEAST_SCALE)


def test_what_meets_the_objective_ranks_above_what_does_not() -> None:
    ranked = sorted((searched(it, 1.1) for it in (0.4, 3.0, 0.8, 1.5)), key=lambda it: it.rank)
    shares = [standing.good_share(1.0) for standing in ranked]
    assert shares == [0.4, 0.8, 1.0, 1.0]
    assert ranked[-1].margin == pytest.approx(3.3, rel=0.1)


def test_several_seeds_count_by_their_mean() -> None:
    standing = Standing(CANDIDATE, 0.9)
    standing.add(1.0, [report(0.88), report(0.94)])
    assert standing.meets(1.0)


def test_each_seed_has_a_margin_of_its_own() -> None:
    standing = Standing(CANDIDATE, 0.9)
    for scale, shares in {1.0: (1.0, 1.0, 0.85), 2.0: (0.95, 0.8, 0.8), 1.5: (1.0, 0.9, 0.85)}.items():
        standing.add(scale, [report(share) for share in shares])
    best, middle, worst = standing.margins
    assert best == 2.0, "it met the objective at every scale"
    assert middle == pytest.approx(1.5)
    assert worst == 1.0, "at none, and less was not tried"
    assert standing.margin == pytest.approx(1.5)
