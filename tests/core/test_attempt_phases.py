from __future__ import annotations

from typing import Any

import pytest

from penstock.core.attempt_phases import EngineTimes, engine_times, phases
from penstock.shapes import AttemptReport


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({}, [("queue", 10.0, 20.0)]),
        ({"began_at": 11.0}, [("queue", 10.0, 11.0), ("prefill", 11.0, 20.0)]),
        (
            {"began_at": 11.0, "first_token_at": 14.0},
            [("queue", 10.0, 11.0), ("prefill", 11.0, 14.0), ("decode", 14.0, 20.0)],
        ),
        (
            {"began_at": 11.0, "pulled_at": 13.0, "first_token_at": 14.0},
            [
                ("queue", 10.0, 11.0),
                ("transfer", 11.0, 13.0),
                ("prefill", 13.0, 14.0),
                ("decode", 14.0, 20.0),
            ],
        ),
    ],
)
def test_phases_follow_each_other_until_the_attempt_ends(
    times: dict[str, Any], expected: list[Any]
) -> None:
    nothing = {"began_at": None, "pulled_at": None, "first_token_at": None}
    report = AttemptReport(
        attempt_id="a", submitted_at=10.0, ended_at=20.0, output_tokens=2, **(nothing | times)
    )
    assert phases(report) == expected


def test_engine_times_are_how_long_each_phase_took() -> None:
    report = AttemptReport(
        "a", 10.0, began_at=11.0, pulled_at=13.0, first_token_at=14.0, ended_at=20.0, output_tokens=2
    )
    assert engine_times(report) == EngineTimes(1000.0, 2000.0, 1000.0, 6000.0)


def test_engine_times_of_clocks_that_disagree_are_not_negative() -> None:
    report = AttemptReport(
        "a", 10.0, began_at=9.0, pulled_at=None, first_token_at=None, ended_at=8.5, output_tokens=0
    )
    assert engine_times(report) == EngineTimes()
