"""What may wait in a frontend, by tenant, over all models."""

from __future__ import annotations

import random

from penstock.core.admission import AdmissionSettings, Queue
from penstock.core.room import REQUEST_BYTES, TOKEN_BYTES, Room, waiting_bytes
from penstock.shapes import Request, Sampling, StructuredOutput


def fill(room: Room, tenant: str, size: int = 10) -> int:
    """Take until there is no room. Returns how much this tenant got."""
    taken = 0
    while room.fits(tenant, size):
        room.take(tenant, size)
        taken += size
    return taken


def test_each_tenant_gets_half_of_what_is_left() -> None:
    room = Room(1200)
    assert [fill(room, tenant) for tenant in "abc"] == [600, 300, 150]
    assert room.used == 1050


def test_what_leaves_makes_room() -> None:
    room = Room(1200)
    fill(room, "a")
    room.give_back("a", 600)
    assert room.used == 0
    assert fill(room, "b") == 600


def test_anything_may_wait_alone() -> None:
    room = Room(100)
    assert room.fits("a", 1000)
    room.take("a", 1000)
    assert not room.fits("b", 1)


def test_a_request_takes_what_its_tokens_and_its_schema_take() -> None:
    spec = StructuredOutput("json", "x" * 5000)
    plain = Request("r", "m", "v", [1] * 1000, Sampling(max_tokens=8))
    shaped = Request("r", "m", "v", [1] * 1000, Sampling(max_tokens=8, structured=spec))
    assert waiting_bytes(plain) == REQUEST_BYTES + 1000 * TOKEN_BYTES
    assert waiting_bytes(shaped) == waiting_bytes(plain) + 5000


def queues(most: int) -> tuple[Queue, Queue]:
    """Of two models, in one frontend."""
    settings, room = AdmissionSettings(max_queued_bytes=most), Room(most)
    first, second = (Queue(settings, random.Random(1), room=room) for _ in range(2))
    return first, second


def test_queues_of_all_models_share_the_room() -> None:
    first, second = queues(1000)
    first.enter("a", "", "t", 0, 1.0, 0.0, size=400)
    assert second.refusal("t", 0, 0.0, size=100) is None
    refused = second.refusal("t", 0, 0.0, size=300)
    assert refused is not None
    assert (refused.reason, refused.limit) == ("full", "bytes")
    assert "reason=full limit=bytes" in str(refused)
    assert second.refusal("other", 0, 0.0, size=300) is None
    first.leave("a")
    assert second.refusal("t", 0, 0.0, size=300) is None


def test_the_room_is_given_back_however_a_request_leaves() -> None:
    first, _ = queues(10_000)
    room = first._room
    for number in range(3):
        first.enter(f"call-{number}", "call", "t", 0, 1.0, 0.0, size=100)
    first.enter("single", "", "t", 0, 1.0, 0.0, size=100)
    first.back("lost", 1.0, 0.0, size=100)
    assert room.used == 500
    first.take("lost", 0.0)
    assert room.used == 400
    first.leave("call-1")
    assert room.used == 300
    first.take("call-0", 0.0)  # the whole call goes
    assert room.used == 100
    first.leave("call-2")
    first.leave("single")
    first.leave("single")
    assert room.used == 0
    assert not room._by_tenant
