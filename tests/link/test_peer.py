from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.link.peer import Peer
from penstock.link.secret import LinkSecret
from penstock.link.settings import ServerSettings
from penstock.shapes import Attempt, Load, Output, Sampling
from penstock.wire.frames import LENGTH_BYTES, decode_to_frontend, encode
from penstock.wire.handshake import FrontendHandshake
from penstock.wire.messages import (
    AssetRequest,
    Cancel,
    Challenge,
    Generate,
    Heartbeat,
    Hello,
    Ping,
    Refused,
    Snapshot,
    Step,
    Welcome,
)
from tests.waiting import WITHIN_S

PART = ServerSettings().snapshot_part_blocks


class OpenDoor:
    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.why_not = ""

    def opened(self, peer: Peer) -> None:
        self.calls.append("opened")

    def objection(self, peer: Peer) -> str:
        return self.why_not

    def welcomed(self, peer: Peer) -> None:
        self.calls.append("welcomed")

    def gone(self, peer: Peer, reason: str) -> None:
        self.calls.append(reason)


class Case:
    """A peer on a transport without a network."""

    def __init__(self, bench: Any, **settings: Any) -> None:
        self.worker = bench.worker({1, 2})
        self.door = OpenDoor()
        self.peer = Peer(ServerSettings(**settings), self.worker, self.door, b"w" * 16)
        self.transport = bench.transport(self.peer.connection)
        self.transport.open()
        self.bench = bench

    def hello(self, secret: str = "") -> Hello:
        (challenge,) = self.take()
        assert isinstance(challenge, Challenge)
        return FrontendHandshake(secret, b"f" * 16, "f1").answer(challenge)

    def greet(self) -> None:
        self.transport.receive(self.hello())

    def take(self) -> list[Any]:
        return self.transport.take(decode_to_frontend)

    async def go_live(self) -> None:
        self.greet()
        await turns(5)
        assert [type(message) for message in self.take()] == [Welcome, Snapshot]

    async def ended(self) -> str:
        return await asyncio.wait_for(self.peer.connection.ended, WITHIN_S)


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_welcome_and_snapshot(bench: Any) -> None:
    case = Case(bench)
    case.worker.running = 9
    case.greet()
    assert case.peer.frontend_id == "f1"
    await turns(5)
    welcome, snapshot = case.take()
    assert welcome == Welcome(card=case.worker.card(), proof=b"")
    assert snapshot == Snapshot(hashes=[1, 2], last=True, load=Load(running=9))
    assert case.door.calls == ["opened", "welcomed"]


async def test_what_is_sent_during_the_snapshot_follows_it(bench: Any) -> None:
    case = Case(bench)
    case.worker.cached = set(range(2 * PART + 1))
    case.greet()
    for number in range(4):
        case.worker.cached.add(10**6 + number)  # after the copy
        case.peer.send(Step(seen=number, load=Load(), stored=[10**6 + number]))
        await turns(1)
    await turns(5)
    case.peer.send(Step(seen=4, load=Load()))
    welcome, *parts, step0, step1, step2, step3, step4 = case.take()
    assert isinstance(welcome, Welcome)
    assert [len(part.hashes) for part in parts] == [PART, PART, 1]
    assert [part.last for part in parts] == [False, False, True]
    assert sorted(number for part in parts for number in part.hashes) == list(range(2 * PART + 1))
    assert [step.seen for step in (step0, step1, step2, step3, step4)] == [0, 1, 2, 3, 4]


async def test_a_whole_number_of_parts_and_an_empty_cache(bench: Any) -> None:
    for count, sizes in ((0, [0]), (PART, [PART, 0])):
        case = Case(bench)
        case.worker.cached = set(range(count))
        case.greet()
        await turns(6)
        assert [len(part.hashes) for part in case.take()[1:]] == sizes


async def test_steps_held_behind_a_snapshot_that_does_not_leave_are_limited(bench: Any) -> None:
    case = Case(bench, max_frame_bytes=50_000, max_unsent_bytes=400_000)
    case.worker.cached = set(range(100_000))
    case.transport.stuck = True
    case.greet()
    await turns(10)
    for _ in range(100):
        case.peer.send(Step(seen=0, load=Load(), stored=list(range(5000))))
    assert "it does not read" in await case.ended()
    assert case.worker.lost == [case.peer]


async def test_a_snapshot_that_does_not_leave_has_a_deadline(bench: Any) -> None:
    case = Case(bench, snapshot_timeout_s=3)
    case.worker.cached = set(range(100_000))
    case.transport.stuck = True
    case.greet()
    await turns(10)
    for _ in range(4):
        case.transport.receive(Ping())
        case.peer.tick(1.0)
    assert await case.ended() == "its snapshot did not leave in 3 s"


async def test_heartbeats_and_silence(bench: Any) -> None:
    case = Case(bench, peer_timeout_s=2)
    await case.go_live()
    case.worker.running = 1
    case.peer.tick(1.0)
    case.peer.tick(1.0)
    received = case.peer.connection.received_bytes
    assert case.take() == [Heartbeat(seen=0, load=Load(running=1), received=received)] * 2
    assert received > 0
    case.transport.receive(Ping())
    case.peer.tick(1.0)
    case.peer.tick(1.0)
    assert case.peer.connection.usable
    case.peer.tick(1.0)
    assert await case.ended() == "nothing heard in 2 s"


async def test_a_handshake_has_a_deadline_whatever_trickles_in(bench: Any) -> None:
    case = Case(bench, handshake_timeout_s=2)
    for _ in range(3):
        case.transport.protocol.data_received(b"\x00")
        case.peer.tick(1.0)
    assert await case.ended() == "no Hello in 2 s"
    assert case.worker.lost == []


@pytest.mark.parametrize("message", [Ping(), Cancel(attempt_id="a"), AssetRequest(sha256="0")])
async def test_nothing_comes_before_the_hello(bench: Any, message: Any) -> None:
    case = Case(bench)
    case.transport.receive(message)
    assert await case.ended() == f"a {type(message).__name__} before the Hello"
    assert case.worker.cancelled == case.worker.lost == []


async def test_frames_are_small_before_the_hello_and_long_after_it(bench: Any) -> None:
    long = encode(Generate(seq=1, attempt=bench.attempt(prompt=100_000)))
    case = Case(bench)
    case.transport.protocol.data_received(long[:4])
    assert "expected 1 to 1024" in await case.ended()
    case = Case(bench)
    await case.go_live()
    case.transport.protocol.data_received(long)
    assert case.worker.generated == [("f1", "a.1")]


async def test_a_refusal_is_sent_and_then_the_connection_closes(bench: Any) -> None:
    case = Case(bench, secret=LinkSecret("s" * 16))
    case.transport.receive(case.hello("t" * 16))
    (refused,) = case.take()
    assert isinstance(refused, Refused)
    assert case.transport.ending == "closed"
    assert await case.ended() == f"refused: {refused.reason}"
    assert case.worker.lost == []


async def test_the_door_may_object(bench: Any) -> None:
    case = Case(bench)
    case.door.why_not = "full"
    case.greet()
    assert case.take() == [Refused(reason="full")]
    assert await case.ended() == "refused: full"
    assert case.door.calls == ["opened", "refused: full"]


async def test_attempts_are_counted_in_order(bench: Any) -> None:
    case = Case(bench)
    await case.go_live()
    for seq in (1, 2):
        case.transport.receive(Generate(seq=seq, attempt=bench.attempt(f"a{seq}")))
        assert case.peer.seen == seq
    case.transport.receive(Generate(seq=4, attempt=bench.attempt("a4")))
    assert await case.ended() == "Generate 4 after 2"
    assert case.worker.generated == [("f1", "a1"), ("f1", "a2")]
    assert case.worker.lost == [case.peer]


async def test_a_load_is_told_out_of_turn_unless_something_is_unsent(bench: Any) -> None:
    case = Case(bench)
    await case.go_live()
    case.worker.running = 2
    case.peer.tell_load()
    assert [message.load.running for message in case.take()] == [2]
    case.transport.stuck = True
    case.peer.tell_load()
    unsent_bytes = case.peer.connection.unsent_bytes
    assert unsent_bytes
    case.peer.tell_load()
    assert case.peer.connection.unsent_bytes == unsent_bytes


async def test_a_second_hello(bench: Any) -> None:
    case = Case(bench)
    hello = case.hello()
    case.transport.receive(hello)
    case.transport.receive(hello)
    assert await case.ended() == "a second Hello"


async def test_a_message_too_long_to_send_cuts(bench: Any) -> None:
    case = Case(bench, max_frame_bytes=1000)
    await case.go_live()
    case.peer.send(Step(seen=0, load=Load(), outputs=[Output("a1", error="x" * 1000)]))
    assert "a Step of" in await case.ended()
    case.peer.send(Heartbeat(seen=0, load=Load()))  # to one that is gone: nothing
    case.peer.tell_load()


async def test_a_step_too_long_for_a_frame_leaves_in_several_that_say_the_same(bench: Any) -> None:
    case = Case(bench, max_frame_bytes=1000)
    await case.go_live()
    outputs = [Output(f"a{number}", list(range(20))) for number in range(20)]
    whole = Step(
        seen=0,
        load=Load(running=2),
        outputs=outputs,
        cleared=True,
        removed=list(range(2**40, 2**40 + 300)),
        stored=list(range(2**40 + 200, 2**40 + 500)),  # a hundred of them after their removal
    )
    case.peer.send(whole)
    listener = bench.listener()
    listener.cached = {7}
    steps = case.take()
    assert len(steps) > 3
    for step in steps:
        assert len(encode(step)) <= 1000 + LENGTH_BYTES
        assert step.load == whole.load
        listener.cached = set() if step.cleared else listener.cached
        listener.on_step(step)
    assert listener.cached == set(whole.stored)
    assert [output for step in steps for output in step.outputs] == outputs


async def test_too_many_files_at_once(bench: Any) -> None:
    case = Case(bench, max_pending_assets=2)
    await case.go_live()
    for _ in range(3):
        case.transport.receive(AssetRequest(sha256="0"))
    assert await case.ended() == "asked for more than 2 files at once"


async def test_a_file_waits_while_the_network_is_slow_and_tokens_do_not(bench: Any) -> None:
    case = Case(bench)
    case.worker.assets["00"] = bytes(3_000_000)
    await case.go_live()
    case.transport.stuck = True
    case.transport.receive(AssetRequest(sha256="00"))
    await turns(10)
    case.peer.send(Step(seen=0, load=Load()))
    asset, step = case.take()
    assert (len(asset.data), type(step)) == (1024 * 1024, Step)
    case.transport.unstick()
    await turns(10)
    assert [part.last for part in case.take()] == [False, True]


async def test_the_door_hears_of_the_end_even_when_the_worker_fails(bench: Any) -> None:
    case = Case(bench)
    await case.go_live()
    case.worker.on_peer_lost = lambda peer: 1 / 0
    case.transport.protocol.connection_lost(None)
    assert case.door.calls[-1] == "closed by the other side"


MESSAGES = st.one_of(
    st.builds(Hello, st.integers(0, 2), st.text(max_size=3), st.binary(max_size=17), st.just(b"")),
    st.builds(Generate, st.integers(0, 3), st.just(Attempt("a", "r", [1], 1, Sampling(max_tokens=1)))),
    st.builds(Cancel, st.text(max_size=3)),
    st.builds(AssetRequest, st.sampled_from(["00", "11"])),
    st.just(Ping()),
    st.binary(min_size=1, max_size=30),
)


@given(st.booleans(), st.lists(MESSAGES, max_size=12))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
async def test_no_order_of_messages_does_more_than_end_the_connection(
    bench: Any, greeted: bool, messages: list[Any]
) -> None:
    case = Case(bench)
    case.worker.assets["00"] = b"content"
    if greeted:
        case.greet()
    for message in messages:
        body = message if isinstance(message, bytes) else encode(message)[4:]
        case.transport.protocol.data_received(len(body).to_bytes(4, "big") + body)
        case.peer.tick(0.1)
        await turns(1)
    case.peer.connection.cut("the test is over")
    await case.ended()
    assert case.worker.lost == ([case.peer] if case.peer.welcomed else [])
