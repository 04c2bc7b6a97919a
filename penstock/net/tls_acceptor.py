"""TLS for a listener whose connections are counted and have a deadline from the moment they are accepted.

With asyncio's `create_server(ssl=...)`, a connection is invisible until its handshake has ended. It cannot
be counted, nor closed to make room for another one. So the listener accepts connections without TLS, and
this module takes each of them over and starts TLS.
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
    """The TLS handshakes of one listener.

    Args:
        context: returns the context with the current certificate; called for each connection.
        handshake_timeout_s: from the acceptance of a connection to the end of its handshake.
        shutdown_timeout_s: for ending TLS on both sides, once a connection is closed.
        room: returns how many handshakes may be under way now. A further one closes the oldest, so that
            silent connections cannot keep others out. With 0, the new connection is closed.
        log: for failed handshakes and refused connections. Strangers must not be able to fill it.
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
        """The number of handshakes under way."""
        return len(self._handshakes)

    def accept(self, make_protocol: MakeProtocol) -> asyncio.Protocol:
        """A protocol for a connection that a listener without TLS accepted. Use it as the listener's
        protocol factory: `lambda: acceptor.accept(Connection)`. The Connection is made and gets its
        transport once the handshake has succeeded."""
        return _Accepted(lambda accepted, address: self._begin(accepted, address, make_protocol))

    async def close(self) -> None:
        """End all handshakes, in one or two turns of the event loop. Close the listener first."""
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
            self._drop(next(iter(self._handshakes)), "too many other handshakes are under way")
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
        """Close a handshake's connection. It no longer counts, and its task ends in the next turn."""
        del self._handshakes[handshake]
        handshake.dropped = reason
        with contextlib.suppress(OSError):  # it is gone already
            handshake.accepted.shutdown(socket.SHUT_RDWR)


class _Handshake:
    """A handshake that is under way."""

    def __init__(self, accepted: socket.socket, address: str) -> None:
        self.accepted = accepted
        self.address = address
        self.dropped = ""  # why it was dropped; empty if it was not


class _Accepted(asyncio.Protocol):
    """Takes a connection over from the transport that the listener made, by duplicating its descriptor.
    (`start_tls` would continue with that transport, but uvloop's may have read the client's hello
    already.)"""

    def __init__(self, take: Callable[[socket.socket, str], None]) -> None:
        self._take = take

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        listed = transport.get_extra_info("socket")
        peer = transport.get_extra_info("peername")
        try:
            accepted = socket.fromfd(listed.fileno(), listed.family, socket.SOCK_STREAM)
        except OSError:
            accepted = None  # no descriptor is left; the connection is closed
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
