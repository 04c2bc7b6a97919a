"""A worker's side of all its links: listens, admits frontends, keeps time for them."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Collection
from dataclasses import dataclass

from penstock.clock import Clock, MonotonicClock
from penstock.errors import ConfigError
from penstock.link import tls
from penstock.link.connection import Connection
from penstock.link.peer import LinkHandler, Peer
from penstock.link.settings import ServerSettings
from penstock.logs.quiet_log import QuietLog
from penstock.net.address import is_loopback, join_address
from penstock.net.tls_acceptor import TlsAcceptor
from penstock.shapes import shortened
from penstock.wire import frames
from penstock.wire.handshake import NONCE_BYTES, PROOF_BYTES
from penstock.wire.messages import Draining, Goodbye, Welcome

__all__ = ["LinkHandler", "LinkServer", "Peer"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LinkServerStatistics:
    """How many connections a worker has."""

    frontends: int  # frontends that were welcomed
    handshakes: int  # connections that have not proved yet that they are a frontend's


class LinkServer:
    """Listens for frontends.

    `start` it, keep `run` running, `close` it. A step of the engine goes to each of `peers` with
    `peer.send(Step(seen=peer.seen, ...))`, in the turn of the event loop in which the handler's
    `snapshot` and `load` begin to include it.
    """

    def __init__(self, settings: ServerSettings, handler: LinkHandler, clock: Clock | None = None) -> None:
        self._settings = settings
        self._handler = handler
        self._clock = clock or MonotonicClock()
        log = QuietLog(_logger, self._clock)
        self._door = _Door(settings, log)
        self._tls: TlsAcceptor | None = None
        if settings.tls is not None:
            self._tls = TlsAcceptor(
                tls.renewed_server_context(settings.tls),
                handshake_timeout_s=settings.handshake_timeout_s,
                shutdown_timeout_s=settings.close_timeout_s,
                room=lambda: settings.max_handshakes,
                log=log,
            )
        self._listener: asyncio.Server | None = None
        self._port = 0

    async def start(self) -> None:
        """Listen. Raises ConfigError when the address cannot be had, or no frontend could take the card."""
        settings, acceptor = self._settings, self._tls
        card_bytes = len(frames.encode(Welcome(card=self._handler.card(), proof=bytes(PROOF_BYTES))))
        if card_bytes > settings.max_frame_bytes:
            raise ConfigError(
                f"link: what this worker tells frontends of itself has {card_bytes} bytes, more than a"
                f" message of {settings.max_frame_bytes}: shorten --served-model-name or --instance-id"
            )
        try:
            self._listener = await asyncio.get_running_loop().create_server(
                self._connected if acceptor is None else lambda: acceptor.accept(self._connected),
                settings.host,
                settings.port,
            )
        except (OSError, UnicodeError) as error:
            address = join_address(settings.host, settings.port)
            raise ConfigError(f"link: cannot listen on {address}: {error}") from error
        self._port = self._listener.sockets[0].getsockname()[1]
        if not settings.secret.accepted() and not is_loopback(settings.host):
            _logger.warning("link listens on %s without a secret: anyone may connect", self.address)

    @property
    def address(self) -> str:
        """host:port as set, with the port that was chosen."""
        return join_address(self._settings.host, self._port)

    @property
    def port(self) -> int:
        """The port that was chosen."""
        return self._port

    @property
    def peers(self) -> Collection[Peer]:
        """The frontends that were welcomed. Sending to them does not change the collection."""
        return self._door.peers.keys()

    def statistics(self) -> LinkServerStatistics:
        """Counts as of now."""
        return LinkServerStatistics(frontends=len(self._door.peers), handshakes=self._door.handshakes)

    async def run(self) -> None:
        """Send heartbeats and enforce deadlines, until cancelled."""
        while True:
            await self._clock.sleep(self._settings.heartbeat_s)
            for peer in self._door.everyone():
                peer.tick(self._settings.heartbeat_s)

    def drain(self, reason: str) -> None:
        """Tell all frontends, and those still to come, that no new attempt is taken."""
        self._door.drain(Draining(reason=shortened(reason)))

    async def close(self, reason: str, *, failed: bool = False) -> None:
        """Say Goodbye and hang up, within `close_timeout_s`; each peer gets its `on_peer_lost`.

        `failed` when the worker did not mean to leave."""
        if self._listener is not None:
            self._listener.close()
        self._door.closed = True
        if self._tls is not None:
            await self._tls.close()
        for peer in self.peers:
            peer.send(Goodbye(reason=shortened(reason), failed=failed))
        connections = [peer.connection for peer in self._door.everyone()]
        for connection in connections:
            connection.close(f"closed here: {reason}")
        await self._all_ended(connections)
        for connection in connections:
            connection.cut(reason)
        await self._all_ended(connections)

    async def _all_ended(self, connections: list[Connection]) -> None:
        waits = [connection.ended for connection in connections]
        if waits:
            await asyncio.wait(waits, timeout=self._settings.close_timeout_s)

    def _connected(self) -> Connection:
        nonce = secrets.token_bytes(NONCE_BYTES)
        return Peer(self._settings, self._handler, self._door, nonce).connection


class _Door:
    """Who is connected, and who may be."""

    def __init__(self, settings: ServerSettings, log: QuietLog) -> None:
        self.closed = False
        self.peers: dict[Peer, None] = {}
        self._strangers: dict[Peer, None] = {}  # connected and not welcomed, oldest first
        self._settings = settings
        self._log = log
        self._draining: Draining | None = None

    @property
    def handshakes(self) -> int:
        """Connections that were not welcomed yet."""
        return len(self._strangers)

    def everyone(self) -> list[Peer]:
        """Strangers and peers."""
        return [*self._strangers, *self.peers]

    def drain(self, draining: Draining) -> None:
        """Send this to all peers, and to those still to come."""
        self._draining = draining
        for peer in self.peers:
            peer.send(draining)

    def opened(self, peer: Peer) -> None:
        if self.closed:  # it was accepted before, and is only now through its TLS handshake
            peer.connection.cut("the server is closed")
        if len(self._strangers) >= self._settings.max_handshakes:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.connection.cut("too many others are at their handshake")
        self._strangers[peer] = None

    def objection(self, peer: Peer) -> str:
        others = [other for other in self.peers if other.frontend_id != peer.frontend_id]
        full = len(others) >= self._settings.max_peers
        return f"the worker has {len(others)} frontends, its most" if full else ""

    def welcomed(self, peer: Peer) -> None:
        for other in list(self.peers):
            if other.frontend_id == peer.frontend_id:  # to that frontend, its old connection is dead
                del self.peers[other]
                other.connection.cut("the same frontend connected again")
        del self._strangers[peer]
        self.peers[peer] = None
        self._log.info("frontend %s connected from %s", peer.frontend_id, peer.connection.peer_address)
        if self._draining is not None:
            peer.send(self._draining)

    def gone(self, peer: Peer, reason: str) -> None:
        self._strangers.pop(peer, None)
        self.peers.pop(peer, None)
        if peer.welcomed:
            if self.closed or peer.left:
                _logger.info("frontend %s disconnected: %s", peer.frontend_id, reason)
            elif peer.connection.misled:  # it may do that again as often as it likes
                self._log.warning("frontend %s is cut off: %s", peer.frontend_id, reason)
            else:
                _logger.warning("frontend %s is lost: %s", peer.frontend_id, reason)
        else:
            self._log.warning(
                "a link from %s was not established: %s", peer.connection.peer_address, reason
            )
