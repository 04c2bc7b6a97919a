"""What a recording says of requests, and what it does not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec.structs import replace

from penstock.core import recording as module
from penstock.core.recording import Recording, RecordingWanted
from penstock.shapes import ModelKey, Request, Sampling

BLOCK = 16
PROMPT, ANSWER = list(range(100, 140)), list(range(500, 512))  # 2.5 blocks, and as much as fills 0.75 more
REQUEST = Request("r1", ModelKey("m", "1"), PROMPT, Sampling(12))


class Reader:
    """Of one recording."""

    def __init__(self, salt: str = "a" * 32, model: str = "", tenant: str | None = None) -> None:
        self.calls = 0
        wanted = RecordingWanted(salt, BLOCK, model)
        self.recording = Recording(wanted, tenant, 10.0, 1000.0, self._more)

    def _more(self) -> None:
        self.calls += 1

    def ended(
        self, prompt: list[int] = PROMPT, answer: list[int] = ANSWER, came_at: float = 10.5, **more: Any
    ) -> list[dict[str, Any]]:
        request = replace(REQUEST, token_ids=prompt, **more)
        self.recording.ended(request, prompt + answer, came_at)
        return [json.loads(line) for line in self.recording.take()]


def test_a_request_is_recorded_by_its_times_lengths_and_blocks() -> None:
    reader = Reader()
    (recorded,) = reader.ended()
    assert reader.calls == 1
    assert recorded["timestamp"] == 1010.5e3
    assert (recorded["input_length"], recorded["output_length"]) == (40, 12)
    assert len(recorded["hash_ids"]) == 3  # two whole blocks and a half
    assert len(recorded["output_hash_ids"]) == 2  # the one that the answer completes, and its last four
    assert (recorded["block_tokens"], recorded["model"], recorded["rounded_ms"]) == (BLOCK, "m", 0)
    assert "session" not in recorded
    assert not reader.recording.take()


def test_a_later_turn_has_the_blocks_of_the_answer_before() -> None:
    reader = Reader()
    (first,) = reader.ended()
    (second,) = reader.ended([*PROMPT, *ANSWER, *range(700, 720)])
    assert second["hash_ids"][:3] == [*first["hash_ids"][:2], first["output_hash_ids"][0]]
    assert second["hash_ids"][3:].count(first["output_hash_ids"][1]) == 0  # that block went on otherwise


def test_another_salt_model_or_cache_salt_has_other_hashes() -> None:
    found = [
        tuple(recorded["hash_ids"])
        for recorded in (
            *Reader().ended(),
            *Reader("b" * 32).ended(),
            *Reader().ended(model=ModelKey("other", "1")),
            *Reader().ended(cache_salt="tenant's"),
        )
    ]
    assert len({name for names in found for name in names}) == sum(map(len, found))


def test_a_session_is_recorded_under_a_name_of_its_own() -> None:
    reader = Reader()
    (first,) = reader.ended(session="one")
    (again,) = reader.ended(session="one")
    (other,) = reader.ended(session="two")
    assert first["session"] == again["session"] != other["session"]


@pytest.mark.parametrize(
    ("reader", "request_fields"),
    [
        (Reader(model="another"), {}),
        (Reader(tenant="team-a"), {"tenant": "team-b"}),
        (Reader(), {"came_at": 9.9}),
    ],
    ids=["another model", "another's request", "it came before the recording began"],
)
def test_other_requests_are_left_out(reader: Reader, request_fields: dict[str, Any]) -> None:
    assert reader.ended(**request_fields) == []
    assert reader.calls == 0


def test_a_reader_that_fetches_nothing_costs_a_bounded_amount_and_hears_what_it_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_WAITING_BYTES", 1000)
    reader = Reader()
    for _ in range(10):
        reader.recording.ended(REQUEST, PROMPT + ANSWER, 11.0)
    there = reader.recording.take()
    assert 0 < len(there) < 10
    (following,) = reader.ended()
    assert following["left_out"] == 10 - len(there)
