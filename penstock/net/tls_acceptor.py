"""TLS for the connections of a listener, which count and have a deadline from the moment they are accepted.

asyncio's `create_server(ssl=...)` shows nobody a connection whose handshake has not ended: it cannot be
counted, nor ended to make room for another. So the listener is one without TLS, and each of its connections
is taken from it here, to go on with TLS.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable
from typing import cast

from penstock.net.address import join_address

MakeProtocol = Callable[[], asyncio.Protocol]


class TlsAcceptor:
    """The handshakes of one listener.

    Args:
        context: the certificate to show now; asked for each connection.
        handshake_timeout_s: from accepted to the end of the handshake.
        shutdown_timeout_s: for TLS to be ended on both sides, once a connection is closed.
        room: how many handshakes may be under way now. One more drops the oldest, so that silent
            connections cannot keep others out; 0 drops the new one.
        log: told of handshakes that failed, and of connections that were not taken; strangers must not be
            able to fill it.
    """

    def __init__(
        self,
        context: Callable[[], ssl.SSLContext],
        *,
        handshake_timeout_s: float,
        shutdown_timeout_s: float,
        room: Callable[[], int],
        log: logging.Logger,
    ) -> None:
        self._context = context
        self._handshake_timeout_s = handshake_timeout_s
        self._shutdown_timeout_s = shutdown_timeout_s
        self._room = room
        self._log = log
        self._handshakes: dict[_Handshake, asyncio.Task[None]] = {}  # oldest first
        self._closed = False

    @property
    def handshakes(self) -> int:
        """How many are under way."""
        return len(self._handshakes)

    def accept(self, make_protocol: MakeProtocol) -> asyncio.Protocol:
        """The protocol factory to give a listener without TLS: `lambda: acceptor.accept(Connection)`. That
        Connection is told of its transport once the handshake is over, and else of nothing."""
        return _Accepted(lambda accepted, address: self._begin(accepted, address, make_protocol))

    async def close(self) -> None:
        """End all handshakes, which takes a turn or two of the event loop. Close the listener before."""
        self._closed = True
        tasks = list(self._handshakes.values())
        for handshake in list(self._handshakes):
            self._drop(handshake, "closed here")
        if tasks:
            await asyncio.wait(tasks)

    def _begin(self, accepted: socket.socket, address: str, make_protocol: MakeProtocol) -> None:
        room = 0 if self._closed else self._room()
        if room <= 0:
            accepted.close()
            self._log.warning("too many connections: %s is dropped before its TLS handshake", address)
            return
        while len(self._handshakes) >= room:
            self._drop(next(iter(self._handshakes)), "too many others are at theirs")
        handshake = _Handshake(accepted, address)
        self._handshakes[handshake] = asyncio.create_task(
            self._shake_hands(handshake, make_protocol), name=f"TLS handshake with {address}"
        )

    async def _shake_hands(self, handshake: _Handshake, make_protocol: MakeProtocol) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                make_protocol,
                handshake.accepted,
                ssl=self._context(),
                ssl_handshake_timeout=self._handshake_timeout_s,
                ssl_shutdown_timeout=self._shutdown_timeout_s,
            )
        except OSError as error:
            reason = handshake.dropped or _said(error)
            self._log.info("TLS handshake with %s failed: %s", handshake.address, reason)
        finally:
            self._handshakes.pop(handshake, None)

    def _drop(self, handshake: _Handshake, reason: str) -> None:
        """It counts no more; its task ends in the next turn, with the connection."""
        del self._handshakes[handshake]
        handshake.dropped = reason
        with contextlib.suppress(OSError):  # it is gone already
            handshake.accepted.shutdown(socket.SHUT_RDWR)


class _Handshake:
    """One that is under way."""

    def __init__(self, accepted: socket.socket, address: str) -> None:
        self.accepted = accepted
        self.address = address
        self.dropped = ""  # why, if it was


class _Accepted(asyncio.Protocol):
    """Takes a connection from the transport that the listener made, by a descriptor of its own. (Going on
    with that transport would be `start_tls`, but uvloop's may have read the client's hello by then.)"""

    def __init__(self, take: Callable[[socket.socket, str], None]) -> None:
        self._take = take

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        listed = transport.get_extra_info("socket")
        peer = transport.get_extra_info("peername")
        try:
            accepted = socket.fromfd(listed.fileno(), listed.family, socket.SOCK_STREAM)
        except OSError:
            accepted = None  # no descriptor is left: this one is not taken
        cast(asyncio.Transport, transport).abort()
        if accepted is not None:
            accepted.setblocking(False)
            self._take(accepted, join_address(peer[0], peer[1]) if peer else "unknown")


def _said(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).lower().replace("_", " ")
    return str(error) or "closed by the other side"
