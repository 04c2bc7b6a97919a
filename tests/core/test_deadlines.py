from __future__ import annotations

import pytest

from penstock.core.deadlines import MISSING, Deadlines, parse_deadlines
from penstock.errors import ConfigError


def test_every_phase_can_be_set() -> None:
    assert parse_deadlines("", Deadlines(queue_s=7)) == Deadlines(queue_s=7)
    text = "queue=1, prefill=2,transfer=3,first_token=4,stall=0.5,request=6,"
    found = parse_deadlines(text, Deadlines())
    assert [found.of(phase) for phase in MISSING] == [1, 2, 3, 4, 0.5]
    assert found.request_s == 6
    assert parse_deadlines("stall=5", Deadlines(queue_s=7)) == Deadlines(queue_s=7, stall_s=5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stal=5", '--deadlines: unknown phase "stal" (did you mean stall?)'),
        ("drain=5", '--deadlines: unknown phase "drain"; one of queue, prefill, transfer, first_token,'),
        ("stall", '--deadlines: stall: expected seconds above 0, got ""'),
        ("stall=0", '--deadlines: stall: expected seconds above 0, got "0"'),
        ("stall=nan", '--deadlines: stall: expected seconds above 0, got "nan"'),
        ("stall=1,stall=2", "--deadlines: stall is given twice"),
    ],
)
def test_anything_else_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_deadlines(text, Deadlines())
    assert str(caught.value).startswith(message)
