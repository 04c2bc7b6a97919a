from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.shapes import Incarnation
from penstock.transfer.grants import KEY_BYTES, Grants, ReadRefused
from penstock.transfer.messages import PROTOCOL, Read

TOTAL_BLOCKS, BLOCK_BYTES = 100, 64


def grants() -> Grants:
    return Grants(Incarnation("w-0", 7), TOTAL_BLOCKS, BLOCK_BYTES)


def read(key: bytes, indices: list[int], handoff_id: str = "h") -> Read:
    return Read(PROTOCOL, handoff_id, Incarnation("w-0", 7), key, BLOCK_BYTES, indices, 1.0)


def test_a_read_gets_the_rows_it_asks_for_in_its_order() -> None:
    table = grants()
    key = table.add("h", [40, 7, 99])
    assert len(key) == KEY_BYTES
    assert table.begin(read(key, [2, 0])) == [99, 40]


def test_keys_are_never_alike() -> None:
    table = grants()
    assert len({table.add(f"h{number}", []) for number in range(100)}) == 100


@pytest.mark.parametrize(
    "wrong",
    [
        {"protocol": PROTOCOL + 1},
        {"holder": Incarnation("w-1", 7)},
        {"holder": Incarnation("w-0", 6)},
        {"key": b""},
        {"key": b"x" * KEY_BYTES},
        {"block_bytes": BLOCK_BYTES + 1},
        {"handoff_id": "g"},
        {"indices": [3]},
        {"indices": [-1]},
        {"indices": [0, 1, 2, 0]},
    ],
    ids=str,
)
def test_what_does_not_match_is_refused_and_leaves_the_grant_open(wrong: dict[str, object]) -> None:
    table = grants()
    right = read(table.add("h", [1, 2, 3]), [0])
    with pytest.raises(ReadRefused):
        table.begin(msgspec.structs.replace(right, **wrong))
    assert table.begin(right) == [1]


def test_a_wrong_key_and_an_unknown_handoff_are_told_alike() -> None:
    table = grants()
    table.add("h", [1])
    answers = []
    for handoff_id in ("h", "unknown"):
        with pytest.raises(ReadRefused) as refused:
            table.begin(read(b"x" * KEY_BYTES, [0], handoff_id))
        answers.append(str(refused.value))
    assert answers[0] == answers[1]


@given(st.lists(st.sampled_from(["add", "begin", "end", "retract"]), max_size=30))
def test_no_row_is_read_after_it_was_let_go(steps: list[str]) -> None:
    """Any order of calls: begun at most once for each add, never after a retract said True."""
    table = grants()
    state, key = "gone", b""
    for step in steps:
        if step == "add" and state != "gone":
            with pytest.raises(ValueError, match="exported already"):
                table.add("h", [1])
        elif step == "add":
            key, state = table.add("h", [1]), "open"
        elif step == "begin" and state == "open":
            assert table.begin(read(key, [0])) == [1]
            state = "reading"
        elif step == "begin":
            with pytest.raises(ReadRefused):
                table.begin(read(key, [0]))
        elif step == "end" and state == "reading":
            table.end("h")
            state = "gone"
        elif step == "retract":
            assert table.retract("h") == (state != "reading")
            state = "reading" if state == "reading" else "gone"
