"""A frontend's end of one connection: from the worker's Challenge to its end.

handshake   waits for the Challenge, then for the Welcome
snapshot    passes on the worker's cached blocks, part by part
live        passes everything on to the listener
"""

from __future__ import annotations

import enum
from typing import Protocol

from penstock.core.prefix_index import most_blocks
from penstock.errors import ProtocolError, RemoteError
from penstock.link.connection import Connection
from penstock.link.download import Download
from penstock.link.settings import ClientSettings
from penstock.shapes import Attempt, Card, Incarnation, Load
from penstock.wire import frames
from penstock.wire.handshake import FrontendHandshake
from penstock.wire.messages import (
    Asset,
    AssetRequest,
    Bounce,
    Challenge,
    Draining,
    Generate,
    Goodbye,
    Heartbeat,
    Ping,
    Refused,
    Snapshot,
    Step,
    ToFrontend,
    ToWorker,
    Welcome,
)
from penstock.wire.reports import Reports

_PING = frames.encode(Ping())

_RECENT = 0.4
"""Part of `silence_s` for which a heartbeat counts as recent: two of them come in that time."""


class LinkListener(Protocol):
    """What a frontend does with one worker's link. All methods are called on the event loop's thread and
    return at once; what they raise ends the connection."""

    def on_cached(self, hashes: list[int], *, first: bool) -> None:
        """A part of what the worker has cached, before `on_up`. The first part begins anew: what came
        over a connection that ended before its `on_up` is void."""

    def on_up(self, card: Card, load: Load) -> None:
        """The worker is there, and its whole cache has been told."""

    def on_step(self, step: Step) -> None:
        """An engine step: the change since `on_up` and the steps before."""

    def on_heartbeat(self, seen: int, load: Load) -> None:
        """The load now, and the highest `seq` of a Generate that it includes."""

    def on_bounce(self, bounce: Bounce) -> None:
        """An attempt was not taken."""

    def on_draining(self, reason: str) -> None:
        """The worker takes no new attempts."""

    def on_down(self, reason: str, orderly: bool) -> None:
        """The worker is gone, with all its attempts; `orderly` when one side meant to leave. Exactly once
        after each `on_up`, and then nothing until the next `on_up`."""


class SessionPhase(enum.Enum):
    """How far a session has come."""

    HANDSHAKE = "handshake"
    SNAPSHOT = "snapshot"
    LIVE = "live"
    ENDED = "ended"


class Session:
    """One connection to a worker.

    Args:
        settings: of the client.
        handshake: fresh for this connection.
        expected: who must answer; with an epoch of 0, any process of that instance; None: whoever does.
        listener: told from `on_up` to `on_down`.
    """

    def __init__(
        self,
        settings: ClientSettings,
        handshake: FrontendHandshake,
        expected: Incarnation | None,
        listener: LinkListener,
    ) -> None:
        self.connection = Connection(self, settings.max_frame_bytes, settings.max_unsent_bytes)
        self.phase = SessionPhase.HANDSHAKE
        self.refused = False  # it ended in a way that only a person can mend
        self.orderly = False  # one side left on purpose, and said so
        self.fell_silent = False  # it was cut because nothing came, or nothing arrived there
        self.was_live = False  # once it has ended: whether `on_up` and `on_down` were called
        self.live_s = 0.0  # how long it was live, once it has ended
        self._settings = settings
        self._handshake = handshake
        self._expected = expected
        self._listener = listener
        self._card: Card | None = None
        self._reports: Reports  # once it is live
        self._cached = 0  # blocks of the snapshot so far
        self._seq = 0  # of the latest Generate
        self._arrived_bytes = 0  # of what was sent, by the worker's latest heartbeat
        self._unmoved_s = 0.0  # ticked since they last became more; something is on its way at any time
        self._untold_s = 0.0  # ticked since that heartbeat
        self._downloads: dict[str, Download] = {}
        self._fetched_bytes = 0  # of files that are here

    @property
    def live(self) -> bool:
        """Whether attempts can be sent."""
        return self.phase is SessionPhase.LIVE and self.connection.usable

    def generate(self, attempt: Attempt) -> int:
        """Send an attempt; see LinkClient."""
        if self._reports.full:
            raise RemoteError("it has too many attempts that have not ended")
        frame = frames.encode(Generate(seq=self._seq + 1, attempt=attempt))
        limit = self._settings.max_frame_bytes
        if len(frame) - frames.LENGTH_BYTES > limit:
            raise ProtocolError(f"{len(frame)} bytes are too long for a frame of at most {limit}")
        if not self.connection.has_room(len(frame)):
            raise RemoteError("its link is full: attempts are sent faster than the network carries them")
        self._seq += 1
        self._reports.sent(attempt)
        self.connection.write(frame)
        return self._seq

    def send(self, message: ToWorker) -> None:
        """Send anything else."""
        self.connection.write(frames.encode(message))

    def download(self, sha256: str) -> Download:
        """Ask for a file, or join those who wait for it. Raises RemoteError when too many are asked for."""
        download = self._downloads.get(sha256)
        if download is None:
            if len(self._downloads) >= self._settings.max_pending_assets:
                raise RemoteError(f"{len(self._downloads)} files have been asked for already")
            download = Download(sha256, self._settings.max_asset_bytes)
            self._downloads[sha256] = download
            self.send(AssetRequest(sha256=sha256))
        return download

    def leave(self, reason: str) -> None:
        """Tell the worker, and end once that is sent; `connection.cut` sets the deadline."""
        self.orderly = True
        if self.phase is not SessionPhase.HANDSHAKE:
            self.send(Goodbye(reason=reason))
        self.connection.close("closed here")

    def tick(self, seconds: float) -> None:
        """Let time pass: send a ping, and cut the connection when a deadline has passed."""
        self.connection.guard(self._tick, seconds)

    def _tick(self, seconds: float) -> None:
        self.connection.tick(seconds)
        settings = self._settings
        if self.phase is SessionPhase.HANDSHAKE:
            if self.connection.phase_s > settings.handshake_timeout_s:
                self.connection.cut(f"no handshake in {settings.handshake_timeout_s:g} s")
            return
        if self.connection.silent_s > settings.silence_s:
            self.fell_silent = True
            self.connection.cut(f"nothing heard in {settings.silence_s:g} s")
        elif self._deaf(seconds):
            self.fell_silent = True
            self.connection.cut(f"nothing that was sent has arrived in {settings.silence_s:g} s")
        elif self.phase is SessionPhase.SNAPSHOT and self.connection.phase_s > settings.snapshot_timeout_s:
            self.connection.cut(f"no snapshot in {settings.snapshot_timeout_s:g} s")
        else:
            self.connection.write(_PING)

    def _deaf(self, seconds: float) -> bool:
        """Whether a worker that is heard hears nothing itself: a path can be cut in one direction, or for
        long packets only.

        A slow line is no cut one, however much waits for it, here or in the kernel: something arrives, and
        the worker's heartbeats say so. Behind much that comes from the worker over a slow line, its
        heartbeats are late; as long as bytes come and no recent word of it, nothing is known.
        """
        self._unmoved_s += seconds
        self._untold_s += seconds
        recent_s = _RECENT * self._settings.silence_s
        unknown = self._untold_s > recent_s and self.connection.silent_s <= recent_s
        return self._arrived_bytes > 0 and self._unmoved_s > self._settings.silence_s and not unknown

    def _heard_of(self, arrived_bytes: int) -> None:
        self._untold_s = 0.0
        if arrived_bytes > self._arrived_bytes:
            self._arrived_bytes = arrived_bytes
            self._unmoved_s = 0.0

    # What the connection calls.

    def opened(self) -> None:
        pass  # the worker speaks first

    def received(self, body: memoryview) -> None:
        message = frames.decode_to_frontend(body)
        if self.phase is SessionPhase.LIVE:
            self._pass_on(message)
        elif self.phase is SessionPhase.SNAPSHOT:
            self._collect(message)
        else:
            self._greet(message)

    def ended(self, reason: str) -> None:
        self.was_live = self.phase is SessionPhase.LIVE
        self.live_s = self.connection.phase_s if self.was_live else 0.0
        self.phase = SessionPhase.ENDED
        for download in self._downloads.values():
            download.fail(reason)
        if self.was_live:
            self._listener.on_down(reason, self.orderly)

    def _greet(self, message: ToFrontend) -> None:
        try:
            match message:
                case Challenge():
                    self.send(self._handshake.answer(message))
                case Welcome() | Refused():
                    self._welcome(self._handshake.finish(message))
                case _:
                    raise ProtocolError(f"a {type(message).__name__} in the handshake")
        except ProtocolError:
            self.refused = True
            raise

    def _welcome(self, card: Card) -> None:
        expected, found = self._expected, card.incarnation
        if expected is not None and not found.may_be(expected):
            raise ProtocolError(f"found instance {found} instead of {expected}")
        self._card = card
        self.phase = SessionPhase.SNAPSHOT
        self.connection.phase_s = 0.0

    def _collect(self, message: ToFrontend) -> None:
        assert self._card is not None
        if isinstance(message, Goodbye):
            self._worker_left(message)
            return
        if not isinstance(message, Snapshot):
            raise ProtocolError(f"a {type(message).__name__} in the snapshot")
        before, most = self._cached, self._settings.max_snapshot_blocks
        self._cached += len(message.hashes)
        if self._cached > most:
            raise ProtocolError(f"snapshot.hashes: more than {most} blocks")
        # Of a worker that says it has more than it can have, one too many is enough to know.
        kept = max(0, most_blocks(self._card.engine.total_blocks) + 1 - before)
        # Part by part: all of a large cache at once would hold up everyone else's tokens.
        self._listener.on_cached(message.hashes[:kept], first=before == 0)
        if message.last:
            self._reports = Reports(self._card, message.load)
            self.phase = SessionPhase.LIVE
            self.connection.phase_s = self._unmoved_s = 0.0
            self._listener.on_up(self._card, message.load)
        else:
            self.connection.rest()

    def _pass_on(self, message: ToFrontend) -> None:
        match message:
            case Step():
                self._reports.step(message)
                self._listener.on_step(message)
            case Heartbeat():
                self._reports.load(message.seen, message.load)
                self._heard_of(message.received)
                self._listener.on_heartbeat(message.seen, message.load)
            case Bounce():
                self._reports.bounce(message)
                self._listener.on_bounce(message)
            case Asset():
                self._take_part(message)
            case Draining():
                self._listener.on_draining(message.reason)
            case Goodbye():
                self._worker_left(message)
            case _:
                raise ProtocolError(f"a {type(message).__name__} after the snapshot")

    def _worker_left(self, goodbye: Goodbye) -> None:
        self.orderly = not goodbye.failed
        self.connection.cut(f"the worker left: {goodbye.reason}")

    def _take_part(self, part: Asset) -> None:
        download = self._downloads.get(part.sha256)
        if download is None:
            raise ProtocolError("a file that was not asked for")
        download.add(part)
        if part.last:
            del self._downloads[part.sha256]
            self._fetched_bytes += download.size
            if self._fetched_bytes > self._settings.max_assets_bytes:
                raise ProtocolError(f"asset: files have {self._fetched_bytes} bytes together")
        else:
            self.connection.rest()
