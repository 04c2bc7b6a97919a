"""The handshake: both sides prove that they know the shared secret, and that they speak one version.

    W  Challenge(protocol, nonce_w)
    F  Hello(protocol, frontend_id, nonce_f, proof_f)
    W  Welcome(card, proof_w)  or  Refused(reason)

    proof = HMAC-SHA256(secret, role, nonce_w, nonce_f, protocol, frontend_id)   each with its length

The secret never travels. A proof cannot be replayed, since each side put a fresh nonce into it, nor sent
back to its maker, since the role ("frontend" or "worker") is in it too. What follows the handshake is not
protected by it, and one who sits in the middle may pass it all on: where the network is not trusted, TLS
is what helps against that.

A worker may know several secrets, as while one replaces another: it takes a proof of any, and proves the
same one in return. A frontend proves one, and believes nothing but that.

No secret means open: anyone may connect, and both sides must agree on that too, so that a secret
forgotten on one side is noticed and named instead of being quietly ignored.

This file does no IO and draws no random numbers: nonces are parameters.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from penstock.errors import ProtocolError
from penstock.shapes import Card
from penstock.wire.messages import PROTOCOL_VERSION, Challenge, Hello, Refused, Welcome

NONCE_BYTES = 16
PROOF_BYTES = 32  # of HMAC-SHA-256
MAX_HELLO_BYTES = 1024
"""Longest frame body that a worker takes from a frontend that has not proved itself."""

_MAX_FRONTEND_ID_CHARS = 128
_MAX_REASON_CHARS = 200


class WorkerHandshake:
    """The worker's side.

    Args:
        secrets: those of which a frontend must know one; empty for open.
        nonce: NONCE_BYTES random bytes, never used before.
    """

    def __init__(self, secrets: Sequence[str], nonce: bytes) -> None:
        self._secrets = secrets
        self._nonce = nonce

    def challenge(self) -> Challenge:
        """What to send first."""
        return Challenge(protocol=PROTOCOL_VERSION, nonce=self._nonce)

    def answer(self, hello: Hello, card: Card) -> Welcome | Refused:
        """What to answer to a Hello; after a Refused, close."""
        reason = self._objection(hello)
        if reason:
            return Refused(reason=reason)
        if not self._secrets:
            return Welcome(card=card, proof=b"")
        for secret in self._secrets:
            expected = _proof(secret, "frontend", self._nonce, hello.nonce, hello.frontend_id)
            if hmac.compare_digest(hello.proof, expected):
                proof = _proof(secret, "worker", self._nonce, hello.nonce, hello.frontend_id)
                return Welcome(card=card, proof=proof)
        return Refused(reason="the link secrets of frontend and worker differ")

    def _objection(self, hello: Hello) -> str:
        if hello.protocol != PROTOCOL_VERSION:
            return (
                f"protocol {hello.protocol} of the frontend is not "
                f"protocol {PROTOCOL_VERSION} of the worker"
            )
        if not 0 < len(hello.frontend_id) <= _MAX_FRONTEND_ID_CHARS or not hello.frontend_id.isprintable():
            return f"a frontend id must be 1 to {_MAX_FRONTEND_ID_CHARS} printable characters"
        if len(hello.nonce) != NONCE_BYTES:
            return f"a nonce must be {NONCE_BYTES} bytes"
        if not self._secrets and hello.proof:
            return "the frontend has a link secret and the worker has none"
        if self._secrets and not hello.proof:
            return "the worker has a link secret and the frontend has none"
        return ""


class FrontendHandshake:
    """The frontend's side.

    Args:
        secret: the one to prove; empty for open.
        nonce: NONCE_BYTES random bytes, never used before.
        frontend_id: names this frontend in the worker's log; unique among running frontends.
    """

    def __init__(self, secret: str, nonce: bytes, frontend_id: str) -> None:
        self._secret = secret
        self._nonce = nonce
        self._frontend_id = frontend_id
        self._challenge: Challenge | None = None

    def answer(self, challenge: Challenge) -> Hello:
        """What to send to a Challenge. Another version still gets its Hello, so that the worker can say
        in its own log, too, why this goes no further."""
        if self._challenge is not None:
            raise ProtocolError("a second Challenge")
        self._challenge = challenge
        proof = _proof(self._secret, "frontend", challenge.nonce, self._nonce, self._frontend_id)
        return Hello(
            protocol=PROTOCOL_VERSION, frontend_id=self._frontend_id, nonce=self._nonce, proof=proof
        )

    def finish(self, reply: Welcome | Refused) -> Card:
        """The card of a worker that has proved itself. Raises ProtocolError with the reason in words when
        it refused, or when it may not be trusted."""
        if isinstance(reply, Refused):
            raise ProtocolError(f"refused: {reply.reason[:_MAX_REASON_CHARS]!r}")
        if self._challenge is None:
            raise ProtocolError("a Welcome before the Challenge")
        if self._challenge.protocol != PROTOCOL_VERSION:
            raise ProtocolError(
                f"protocol {self._challenge.protocol} of the worker is not "
                f"protocol {PROTOCOL_VERSION} of the frontend"
            )
        expected = _proof(self._secret, "worker", self._challenge.nonce, self._nonce, self._frontend_id)
        if not hmac.compare_digest(reply.proof, expected):
            raise ProtocolError("the worker does not know the link secret")
        return reply.card


def _proof(secret: str, role: str, worker_nonce: bytes, frontend_nonce: bytes, frontend_id: str) -> bytes:
    """Empty without a secret: there is nothing to prove."""
    if not secret:
        return b""
    parts = (
        role.encode(),
        worker_nonce,
        frontend_nonce,
        str(PROTOCOL_VERSION).encode(),
        frontend_id.encode(),
    )
    text = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return hmac.digest(secret.encode(), text, "sha256")
