"""The handshake: who knows the secret gets in, nobody else, and both sides know why."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from penstock.errors import ProtocolError
from penstock.wire.handshake import MAX_HELLO_BYTES, FrontendHandshake, WorkerHandshake
from penstock.wire.messages import PROTOCOL_VERSION, Challenge, Hello, Refused, Welcome
from tests.cards import card

CARD = card()
NONCE_W, NONCE_F = b"w" * 16, b"f" * 16


def exchange(
    worker_secrets: Sequence[str], frontend_secret: str, frontend_id: str = "f1"
) -> tuple[FrontendHandshake, Welcome | Refused]:
    worker = WorkerHandshake(worker_secrets, NONCE_W)
    frontend = FrontendHandshake(frontend_secret, NONCE_F, frontend_id)
    return frontend, worker.answer(frontend.answer(worker.challenge()), CARD)


@pytest.mark.parametrize("secret", ["", "s", "ü" * 1000])
def test_the_same_secret_on_both_sides(secret: str) -> None:
    frontend, reply = exchange([secret] if secret else [], secret)
    assert isinstance(reply, Welcome)
    assert frontend.finish(reply) == CARD
    assert bool(reply.proof) == bool(secret)


@pytest.mark.parametrize(
    ("worker_secrets", "frontend_secret", "reason"),
    [
        ("a", "b", "the link secrets of frontend and worker differ"),
        ("ac", "b", "the link secrets of frontend and worker differ"),
        ("a", "", "the worker has a link secret and the frontend has none"),
        ("", "b", "the frontend has a link secret and the worker has none"),
    ],
)
def test_different_secrets_are_named_on_both_sides(
    worker_secrets: str, frontend_secret: str, reason: str
) -> None:
    frontend, reply = exchange(tuple(worker_secrets), frontend_secret)
    assert reply == Refused(reason=reason)
    with pytest.raises(ProtocolError, match=reason):
        frontend.finish(reply)


@pytest.mark.parametrize("frontend_secret", ["old", "new"])
@pytest.mark.parametrize("worker_secrets", [("old", "new"), ("new", "old")])
def test_a_worker_takes_any_of_its_secrets_and_proves_the_same(
    worker_secrets: tuple[str, ...], frontend_secret: str
) -> None:
    frontend, reply = exchange(worker_secrets, frontend_secret)
    assert isinstance(reply, Welcome)
    assert frontend.finish(reply) == CARD
    other = exchange(worker_secrets, "new" if frontend_secret == "old" else "old")[1]
    assert isinstance(other, Welcome)
    with pytest.raises(ProtocolError, match="does not know"):
        frontend.finish(other)


def test_another_version_is_named_on_both_sides() -> None:
    worker = WorkerHandshake(["s"], NONCE_W)
    frontend = FrontendHandshake("s", NONCE_F, "f1")
    ours, theirs = PROTOCOL_VERSION, PROTOCOL_VERSION + 1
    newer = msgspec.structs.replace(worker.challenge(), protocol=theirs)
    hello = frontend.answer(newer)  # so that the worker can name it too
    refused = worker.answer(msgspec.structs.replace(hello, protocol=theirs), CARD)
    assert isinstance(refused, Refused)
    assert f"protocol {theirs} of the frontend is not protocol {ours} of the worker" in refused.reason
    with pytest.raises(ProtocolError, match=f"protocol {theirs} of the worker is not protocol {ours}"):
        frontend.finish(Welcome(card=CARD, proof=b""))


def test_a_worker_without_the_secret_is_not_believed() -> None:
    frontend, reply = exchange(["s"], "s")
    assert isinstance(reply, Welcome)
    for proof in (b"", b"x" * 32, reply.proof[:-1]):
        with pytest.raises(ProtocolError, match="the worker does not know the link secret"):
            frontend.finish(Welcome(card=CARD, proof=proof))


def test_a_proof_cannot_be_replayed() -> None:
    first = WorkerHandshake(["s"], NONCE_W)
    hello = FrontendHandshake("s", NONCE_F, "f1").answer(first.challenge())
    assert isinstance(first.answer(hello, CARD), Welcome)
    assert isinstance(WorkerHandshake(["s"], b"v" * 16).answer(hello, CARD), Refused)


def test_a_proof_cannot_be_sent_back_to_its_maker() -> None:
    frontend = FrontendHandshake("s", NONCE_F, "f1")
    hello = frontend.answer(Challenge(protocol=PROTOCOL_VERSION, nonce=NONCE_F))
    with pytest.raises(ProtocolError, match="does not know"):
        frontend.finish(Welcome(card=CARD, proof=hello.proof))


def test_a_proof_is_bound_to_the_frontend_id() -> None:
    worker = WorkerHandshake(["s"], NONCE_W)
    hello = FrontendHandshake("s", NONCE_F, "f1").answer(worker.challenge())
    assert isinstance(worker.answer(msgspec.structs.replace(hello, frontend_id="f2"), CARD), Refused)


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        (Hello(PROTOCOL_VERSION, "", NONCE_F, b""), "frontend id"),
        (Hello(PROTOCOL_VERSION, "x" * 129, NONCE_F, b""), "frontend id"),
        (Hello(PROTOCOL_VERSION, "a\nb", NONCE_F, b""), "frontend id"),
        (Hello(PROTOCOL_VERSION, "f", b"", b""), "nonce"),
        (Hello(PROTOCOL_VERSION, "f", b"x" * 17, b""), "nonce"),
    ],
)
def test_malformed_hellos_are_refused(hello: Hello, reason: str) -> None:
    reply = WorkerHandshake([], NONCE_W).answer(hello, CARD)
    assert isinstance(reply, Refused)
    assert reason in reply.reason


def test_handshake_messages_out_of_order_are_refused() -> None:
    frontend = FrontendHandshake("", NONCE_F, "f1")
    with pytest.raises(ProtocolError, match="before the Challenge"):
        frontend.finish(Welcome(card=CARD, proof=b""))
    frontend.answer(WorkerHandshake([], NONCE_W).challenge())
    with pytest.raises(ProtocolError, match="second Challenge"):
        frontend.answer(WorkerHandshake([], NONCE_W).challenge())


def test_a_refusal_may_come_first_and_fakes_no_log_line() -> None:
    frontend = FrontendHandshake("", NONCE_F, "f1")
    with pytest.raises(ProtocolError) as caught:
        frontend.finish(Refused(reason="x\ny" * 1000))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_the_longest_hello_fits_its_frame() -> None:
    worker = WorkerHandshake(["s"], NONCE_W)
    hello = FrontendHandshake("s", NONCE_F, "\N{GRINNING FACE}" * 128).answer(worker.challenge())
    assert isinstance(worker.answer(hello, CARD), Welcome)
    assert len(msgspec.msgpack.encode(hello)) <= MAX_HELLO_BYTES
