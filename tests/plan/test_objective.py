"""Objectives, as they are typed."""

from __future__ import annotations

import pytest

from penstock.bench.measurements import Slo
from penstock.errors import ConfigError
from penstock.plan.objective import SHARE, Objective


def test_limits_and_share_are_read() -> None:
    assert Objective.parse("ttft=2s,itl=25ms") == Objective(Slo(2000.0, 25.0), SHARE)
    assert Objective.parse(" ttft=500ms , share=99.5% ") == Objective(Slo(500.0, None), 0.995)
    assert Objective.parse("itl=0.5s") == Objective(Slo(None, 500.0), SHARE)


def test_what_is_written_is_what_is_read() -> None:
    objective = Objective.parse("ttft=1.5s,itl=25ms,share=95%")
    assert Objective.parse(str(objective)) == objective


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "is not like ttft=2s,itl=25ms,share=95%"),
        ("ttft", "is not like"),
        ("tpot=2s", "is not like"),
        ("ttft=2s,ttft=3s", "is not like"),
        ("share=90%", "limits neither ttft nor itl"),
        ("ttft=2", "ttft: expected a time such as 2s"),
        ("ttft=0s", "ttft: expected a time such as 2s"),
        ("itl=-1ms", "itl: expected a time"),
        ("ttft=2s,share=0%", "share: expected more than 0%"),
        ("ttft=2s,share=101%", "share: expected more than 0%"),
        ("ttft=2s,share=0.9", "share: expected more than 0%"),
    ],
)
def test_what_is_wrong_is_named(text: str, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        Objective.parse(text)
