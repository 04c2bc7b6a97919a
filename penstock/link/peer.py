"""A worker's end of one link: greets a frontend, gives it a consistent start, then passes on what it asks.

handshake   Challenge sent; only a Hello is accepted, and frames are small
welcomed    Welcome sent and the cache copied, in one step of the event loop: what the engine says
            from here on is a delta to that copy. The copy leaves in parts, as the network takes them,
            while those deltas are held back behind it
live        everything leaves at once
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from penstock.errors import ProtocolError
from penstock.link.connection import Connection
from penstock.link.settings import ServerSettings
from penstock.shapes import Attempt, Card, Load
from penstock.wire import frames
from penstock.wire.handshake import MAX_HELLO_BYTES, WorkerHandshake
from penstock.wire.messages import (
    Asset,
    AssetRequest,
    Cancel,
    Generate,
    Goodbye,
    Heartbeat,
    Hello,
    Ping,
    Refused,
    Release,
    Snapshot,
    Step,
    ToFrontend,
    Welcome,
    halves,
)

ASSET_PART_BYTES = 1024 * 1024


class LinkHandler(Protocol):
    """What a worker does for its links. All methods are called on the event loop's thread and return at
    once. None is expected to raise: what one raises ends the connection it was called for."""

    def card(self) -> Card:
        """What this worker is."""

    def snapshot(self) -> tuple[Iterable[int], Load]:
        """The sequence hashes cached now, and the load. Steps sent to the peers after this call must be
        the changes since."""

    def load(self) -> Load:
        """The load now, for a heartbeat."""

    def asset(self, sha256: str) -> bytes | None:
        """The content of a file on the card; None for any other."""

    def on_generate(self, peer: Peer, attempt: Attempt) -> None:
        """Run an attempt. From now on `peer.seen` counts it, so the load must too."""

    def on_cancel(self, peer: Peer, attempt_id: str) -> None:
        """End an attempt; it may have ended already, or never have been."""

    def on_release(self, peer: Peer, handoff_id: str, sent: bool) -> None:
        """Drop a handoff; it may be gone already, or never have been."""

    def on_peer_lost(self, peer: Peer) -> None:
        """Nobody waits for this peer's attempts any more. Once per peer; nothing of it follows."""


class Door(Protocol):
    """Who decides which frontends come in (the server)."""

    def opened(self, peer: Peer) -> None:
        """A stranger has connected."""

    def objection(self, peer: Peer) -> str:
        """Why a peer whose proof is good may not come in; "" when it may."""

    def welcomed(self, peer: Peer) -> None:
        """A peer has come in: from now on it gets every step."""

    def gone(self, peer: Peer, reason: str) -> None:
        """The connection of a stranger or a peer has ended."""


class Peer:
    """One frontend, as its worker sees it.

    Args:
        settings: of the server.
        handler: the worker.
        door: the server.
        nonce: as for WorkerHandshake.
    """

    def __init__(self, settings: ServerSettings, handler: LinkHandler, door: Door, nonce: bytes) -> None:
        self.frontend_id = ""
        self.seen = 0  # seq of the latest Generate handed to the handler
        self.welcomed = False
        self.left = False  # it said Goodbye
        self.connection = Connection(self, MAX_HELLO_BYTES, settings.max_unsent_bytes)
        self._settings = settings
        self._handler = handler
        self._door = door
        self._handshake = WorkerHandshake(settings.secret.accepted(), nonce)
        self._held: list[bytes] | None = None  # frames behind a snapshot that is still leaving
        self._held_bytes = 0
        self._pending_assets = 0

    def send(self, message: ToFrontend) -> None:
        """Send a message, never waiting; a step that is too long for a frame in several. A peer that reads
        too slowly is cut, and `on_peer_lost` follows; to a peer that is gone, nothing is sent. What cannot
        be encoded ends the connection."""
        self.connection.guard(self._send, message)

    def _send(self, message: ToFrontend) -> None:
        frame = frames.encode(message)
        if len(frame) - frames.LENGTH_BYTES > self._settings.max_frame_bytes:
            parts = halves(message) if isinstance(message, Step) else None
            if parts is None:
                self.connection.cut(f"a {type(message).__name__} of {len(frame)} bytes is too long to send")
                return
            for part in parts:
                self.send(part)
        elif self._held is None:
            self.connection.write(frame)
        elif self.connection.usable:
            self._held.append(frame)
            self._held_bytes += len(frame)
            self.connection.check_unsent(self._held_bytes)

    def tick(self, seconds: float) -> None:
        """Let time pass: send a heartbeat, and cut the connection when a deadline has passed."""
        self.connection.guard(self._tick, seconds)

    def _tick(self, seconds: float) -> None:
        self.connection.tick(seconds)
        settings = self._settings
        if not self.welcomed:
            if self.connection.phase_s > settings.handshake_timeout_s:
                self.connection.cut(f"no Hello in {settings.handshake_timeout_s:g} s")
        elif self.connection.silent_s > settings.peer_timeout_s:
            self.connection.cut(f"nothing heard in {settings.peer_timeout_s:g} s")
        elif self._held is not None and self.connection.phase_s > settings.snapshot_timeout_s:
            self.connection.cut(f"its snapshot did not leave in {settings.snapshot_timeout_s:g} s")
        else:
            self._beat()

    def tell_load(self) -> None:
        """Send a heartbeat out of turn. Not where anything is still unsent: whoever reads slowly hears of
        the load by what follows that."""
        self.connection.guard(self._tell_load)

    def _tell_load(self) -> None:
        if self._held is None and not self.connection.unsent_bytes:
            self._beat()

    def _beat(self) -> None:
        received = self.connection.received_bytes
        self.send(Heartbeat(seen=self.seen, load=self._handler.load(), received=received))

    # What the connection calls.

    def opened(self) -> None:
        self._door.opened(self)
        self.connection.write(frames.encode(self._handshake.challenge()))

    def received(self, body: memoryview) -> None:
        message = frames.decode_to_worker(body)
        if not self.welcomed:
            if not isinstance(message, Hello):
                raise ProtocolError(f"a {type(message).__name__} before the Hello")
            self._greet(message)
            return
        match message:
            case Generate():
                if message.seq != self.seen + 1:
                    raise ProtocolError(f"Generate {message.seq} after {self.seen}")
                self.seen = message.seq
                self._handler.on_generate(self, message.attempt)
            case Cancel():
                self._handler.on_cancel(self, message.attempt_id)
            case Release():
                self._handler.on_release(self, message.handoff_id, message.sent)
            case AssetRequest():
                self._send_asset(message.sha256)
            case Ping():
                pass
            case Goodbye():
                self.left = True
                self.connection.cut(f"the frontend left: {message.reason}")
            case Hello():
                raise ProtocolError("a second Hello")

    def ended(self, reason: str) -> None:
        self._held = None
        try:
            if self.welcomed:
                self._handler.on_peer_lost(self)
        finally:
            self._door.gone(self, reason)

    def _greet(self, hello: Hello) -> None:
        answer = self._handshake.answer(hello, self._handler.card())
        if isinstance(answer, Welcome):
            self.frontend_id = hello.frontend_id
            objection = self._door.objection(self)
            answer = Refused(reason=objection) if objection else answer
        self.connection.write(frames.encode(answer))
        if isinstance(answer, Refused):
            self.connection.close(f"refused: {answer.reason}")
        else:
            self._begin()

    def _begin(self) -> None:
        hashes, load = self._handler.snapshot()
        self.welcomed = True
        self.connection.limit_frames(self._settings.max_frame_bytes)
        self.connection.phase_s = 0.0
        self._held = []
        self.connection.write_paced(self._snapshot_frames(list(hashes), load))
        self._door.welcomed(self)

    def _snapshot_frames(self, hashes: list[int], load: Load) -> Iterator[bytes]:
        """The parts of a snapshot; once they have left, what was held back follows."""
        part = self._settings.snapshot_part_blocks
        whole = len(hashes) // part * part
        for start in range(0, whole, part):
            yield frames.encode(Snapshot(hashes=hashes[start : start + part]))
        yield frames.encode(Snapshot(hashes=hashes[whole:], last=True, load=load))
        held, self._held = self._held or [], None
        self._held_bytes = 0
        for frame in held:
            self.connection.write(frame)

    def _send_asset(self, sha256: str) -> None:
        if self._pending_assets == self._settings.max_pending_assets:
            raise ProtocolError(f"asked for more than {self._pending_assets} files at once")
        self._pending_assets += 1
        self.connection.write_paced(self._asset_frames(sha256, self._handler.asset(sha256)))

    def _asset_frames(self, sha256: str, content: bytes | None) -> Iterator[bytes]:
        """The parts of a file, at least one."""
        whole = content or b""
        last_start = max(0, len(whole) - 1) // ASSET_PART_BYTES * ASSET_PART_BYTES
        for start in range(0, last_start + 1, ASSET_PART_BYTES):
            last = start == last_start
            if last:  # before it leaves, since its arrival allows the next request
                self._pending_assets -= 1
            part = whole[start : start + ASSET_PART_BYTES]
            yield frames.encode(Asset(sha256=sha256, data=part, last=last, missing=content is None))
