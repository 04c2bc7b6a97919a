from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.errors import ProtocolError, RemoteError
from penstock.link.session import Session
from penstock.link.settings import ClientSettings
from penstock.shapes import Incarnation, Load
from penstock.wire.frames import decode_to_worker, encode
from penstock.wire.handshake import FrontendHandshake, WorkerHandshake
from penstock.wire.messages import (
    Asset,
    AssetRequest,
    Cancel,
    Challenge,
    Draining,
    Goodbye,
    Heartbeat,
    Ping,
    Refused,
    Snapshot,
    Step,
    Welcome,
)
from tests.cards import card
from tests.waiting import WITHIN_S

CARD = card(total_blocks=10)
STEP = Step(seen=0, load=Load())


class Case:
    """A session on a transport without a network."""

    def __init__(self, bench: Any, expected: Incarnation | None = None, **settings: Any) -> None:
        self.listener = bench.listener()
        handshake = FrontendHandshake("s", b"f" * 16, "f1")
        self.session = Session(ClientSettings(**settings), handshake, expected, self.listener)
        self.transport = bench.transport(self.session.connection)
        self.transport.open()
        self.worker = WorkerHandshake(["s"], b"w" * 16)

    def greet(self) -> None:
        self.transport.receive(self.worker.challenge())
        (hello,) = self.take()
        self.transport.receive(self.worker.answer(hello, CARD))

    def go_live(self) -> None:
        self.greet()
        self.transport.receive(Snapshot(hashes=[1], last=True))
        assert self.session.live

    def take(self) -> list[Any]:
        return self.transport.take(decode_to_worker)

    async def ended(self) -> str:
        return await asyncio.wait_for(self.session.connection.ended, WITHIN_S)


async def test_up_comes_with_the_last_part_of_the_snapshot(bench: Any) -> None:
    case = Case(bench)
    case.greet()
    case.listener.cached = {7}  # of a connection before
    case.transport.receive(Snapshot(hashes=[1, 2]))
    assert case.listener.calls == []
    assert case.listener.cached == {1, 2}
    assert not case.transport.reading  # others have their turn before the next part
    await asyncio.sleep(0)
    assert case.transport.reading
    case.transport.receive(Snapshot(hashes=[3], last=True, load=Load(running=2)))
    assert case.listener.calls == [("up", CARD)]
    assert case.listener.cached == {1, 2, 3}
    assert case.listener.load == Load(running=2)
    case.transport.receive(STEP)
    case.transport.receive(Draining(reason="d"))
    assert case.listener.steps == [STEP]
    assert case.listener.calls[-1] == ("draining", "d")


async def test_the_listener_may_send_from_on_up(bench: Any) -> None:
    case = Case(bench)
    case.listener.on_up = lambda card, load: case.session.generate(bench.attempt())
    case.go_live()
    assert [message.seq for message in case.take()] == [1]


async def test_down_once_with_the_reason(bench: Any) -> None:
    case = Case(bench)
    case.go_live()
    case.transport.protocol.data_received(encode(Goodbye(reason="leaving")) + encode(STEP))
    assert not case.session.live
    assert await case.ended() == "the worker left: leaving"
    assert case.listener.downs == ["the worker left: leaving"]
    assert case.listener.steps == []
    assert not case.session.refused


@pytest.mark.parametrize("message", [Goodbye(reason="x"), STEP, Welcome(card=CARD, proof=b"")])
async def test_no_up_no_down(bench: Any, message: Any) -> None:
    case = Case(bench)
    case.greet()
    case.transport.receive(message)
    await case.ended()
    assert case.listener.calls == []


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (Refused(reason="full"), "refused: 'full'"),
        (Welcome(card=CARD, proof=b"forged"), "the worker does not know the link secret"),
        (STEP, "a Step in the handshake"),
        (Challenge(protocol=1, nonce=b""), "a second Challenge"),
    ],
)
async def test_a_failed_handshake_is_a_refusal(bench: Any, message: Any, reason: str) -> None:
    case = Case(bench)
    case.transport.receive(case.worker.challenge())
    case.transport.receive(message)
    assert await case.ended() == reason
    assert case.session.refused


async def test_another_instance(bench: Any) -> None:
    case = Case(bench, expected=Incarnation("w2", 0))
    case.greet()
    assert "found instance w1@1 instead of w2@0" in await case.ended()
    assert case.session.refused


@pytest.mark.parametrize("message", [Snapshot(hashes=[]), Refused(reason="x"), Asset(sha256="unasked")])
async def test_what_may_not_come_when_live(bench: Any, message: Any) -> None:
    case = Case(bench)
    case.go_live()
    case.transport.receive(message)
    await case.ended()
    assert len(case.listener.downs) == 1


async def test_an_endless_snapshot(bench: Any) -> None:
    case = Case(bench, max_snapshot_blocks=10)
    case.greet()
    for _ in range(11):
        case.transport.receive(Snapshot(hashes=[1]))
    assert await case.ended() == "snapshot.hashes: more than 10 blocks"


async def test_pings_and_silence(bench: Any) -> None:
    case = Case(bench, silence_s=1.0, ping_s=0.5)
    case.go_live()
    case.session.tick(0.5)
    assert case.take() == [Ping()]
    case.transport.receive(Heartbeat(seen=0, load=Load()))
    assert case.listener.calls[-1] == ("heartbeat", 0)
    for _ in range(2):
        case.session.tick(0.5)
        assert case.session.live  # the first tick may have come just after the last bytes
    case.session.tick(0.5)
    assert not case.session.live
    assert await case.ended() == "nothing heard in 1 s"
    assert case.listener.downs == ["nothing heard in 1 s"]


def told(received: int) -> Heartbeat:
    return Heartbeat(seen=0, load=Load(), received=received)


async def test_a_worker_that_is_heard_and_hears_nothing(bench: Any) -> None:
    """Cut off in one direction: its heartbeats come, what is sent to it does not arrive."""
    case = Case(bench, silence_s=1.0, ping_s=0.25)
    case.go_live()
    for received in range(100, 110):
        case.session.tick(0.25)
        case.transport.receive(told(received))
    for _ in range(4):
        case.session.tick(0.25)
        assert case.session.live
        case.transport.receive(told(109))
    case.session.tick(0.25)
    assert await case.ended() == "nothing that was sent has arrived in 1 s"
    assert case.session.fell_silent


async def test_a_long_prompt_on_a_slow_line_is_only_on_its_way(bench: Any) -> None:
    """Whether it still waits here or in the kernel: part after part arrives."""
    case = Case(bench, silence_s=1.0, ping_s=0.25)
    case.go_live()
    case.session.generate(bench.attempt(prompt=10_000))
    for second in range(20):
        case.transport.receive(told(100 + second))
        for _ in range(4):
            case.session.tick(0.25)
            case.transport.receive(told(100 + second))
    assert case.session.live


async def test_a_heartbeat_that_is_late_behind_a_long_answer_says_nothing_of_the_other_direction(
    bench: Any,
) -> None:
    case = Case(bench, silence_s=1.0, ping_s=0.25)
    case.go_live()
    case.transport.receive(told(100))
    for _ in range(20):
        case.session.tick(0.25)
        case.transport.receive(STEP)  # bytes that were sent before any further heartbeat
    assert case.session.live
    case.transport.receive(told(100))  # it comes, and has nothing better to say
    case.session.tick(0.25)
    assert await case.ended() == "nothing that was sent has arrived in 1 s"


async def test_a_worker_that_does_not_tell_what_arrives_is_not_called_deaf(bench: Any) -> None:
    case = Case(bench, silence_s=1.0, ping_s=0.25)
    case.go_live()
    case.session.generate(bench.attempt())
    for _ in range(20):
        case.session.tick(0.25)
        case.transport.receive(told(0))
    assert case.session.live


async def test_deadlines_of_the_handshake_and_the_snapshot(bench: Any) -> None:
    case = Case(bench, handshake_timeout_s=1.0, silence_s=1.0)
    case.session.tick(1.0)
    assert case.take() == []  # no ping to one that has not said who it is
    case.session.tick(1.0)
    assert await case.ended() == "no handshake in 1 s"
    case = Case(bench, snapshot_timeout_s=1.0)
    case.greet()
    for _ in range(3):
        case.session.tick(0.5)
        case.transport.receive(Snapshot(hashes=[1]))
    assert await case.ended() == "no snapshot in 1 s"


async def test_an_attempt_too_long_for_a_frame_takes_no_seq(bench: Any) -> None:
    case = Case(bench, max_frame_bytes=10_000)
    case.go_live()
    with pytest.raises(ProtocolError, match="too long for a frame"):
        case.session.generate(bench.attempt(prompt=10_000))
    assert case.session.generate(bench.attempt()) == 1
    assert len(case.take()) == 1


async def test_a_worker_that_does_not_read_is_down(bench: Any) -> None:
    case = Case(bench, max_frame_bytes=50_000, max_unsent_bytes=100_000)
    case.go_live()
    case.transport.stuck = True
    for _ in range(100_000):
        case.session.send(Cancel(attempt_id="a1"))
    assert not case.session.live
    assert "it does not read" in await case.ended()
    assert len(case.listener.downs) == 1


async def test_attempts_that_find_the_link_full_go_elsewhere_and_do_not_end_it(bench: Any) -> None:
    """Long prompts sent at a time by one client must not cost the others their worker."""
    case = Case(bench, max_frame_bytes=50_000, max_unsent_bytes=100_000)
    case.go_live()
    case.transport.stuck = True
    sent = 0
    with pytest.raises(RemoteError, match="its link is full"):  # noqa: PT012
        while True:
            case.session.generate(bench.attempt(prompt=3000))
            sent += 1
    assert sent > 5
    assert case.session.live
    case.session.send(Cancel(attempt_id="a1"))
    case.session.tick(0.5)
    assert case.session.live
    case.transport.unstick()
    case.take()
    assert case.session.generate(bench.attempt()) == sent + 1  # what was refused has no number


async def test_files_are_lost_with_the_connection(bench: Any) -> None:
    case = Case(bench, max_pending_assets=2)
    case.go_live()
    first, second = case.session.download("a"), case.session.download("b")
    assert case.session.download("a") is first
    with pytest.raises(RemoteError, match="2 files have been asked for already"):
        case.session.download("c")
    assert case.take() == [AssetRequest(sha256="a"), AssetRequest(sha256="b")]
    case.transport.receive(Asset(sha256="a", last=True, missing=True))
    case.session.connection.cut("pulled")
    await case.ended()
    assert await first.done == "the worker does not have it"
    assert second.done.done()
    assert await second.done == "pulled"


MESSAGES = st.one_of(
    st.builds(Challenge, st.integers(0, 2), st.binary(max_size=17)),
    st.builds(Welcome, st.just(CARD), st.binary(max_size=2)),
    st.builds(Snapshot, st.lists(st.integers(0, 2**64 - 1), max_size=3), st.booleans()),
    st.builds(Asset, st.sampled_from(["00", "11"]), st.binary(max_size=3), st.booleans(), st.booleans()),
    st.builds(Goodbye, st.text(max_size=3)),
    st.builds(Draining, st.text(max_size=3)),
    st.just(STEP),
    st.just(Heartbeat(seen=0, load=Load())),
    st.binary(min_size=1, max_size=30),
)


@given(st.integers(0, 2), st.lists(MESSAGES, max_size=12))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
async def test_no_order_of_messages_does_more_than_end_the_connection(
    bench: Any, phase: int, messages: list[Any]
) -> None:
    case = Case(bench)
    if phase:
        case.greet()
    if phase == 2:
        case.transport.receive(Snapshot(hashes=[], last=True))
        case.session.download("00")
    for message in messages:
        body = message if isinstance(message, bytes) else encode(message)[4:]
        case.transport.protocol.data_received(len(body).to_bytes(4, "big") + body)
        case.session.tick(0.1)
        await asyncio.sleep(0)
    case.session.connection.cut("the test is over")
    await case.ended()
    assert len(case.listener.downs) == case.listener.ups <= 1
    assert all(download.done.done() for download in case.session._downloads.values())
