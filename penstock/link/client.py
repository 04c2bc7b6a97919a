"""A frontend's link to one worker: connects, reconnects, and sends."""

from __future__ import annotations

import asyncio
import logging
import random
import secrets

from penstock.clock import Clock, MonotonicClock
from penstock.errors import ConfigError, RemoteError
from penstock.link import tls
from penstock.link.session import LinkListener, Session
from penstock.link.settings import ClientSettings
from penstock.net.address import split_address
from penstock.shapes import Attempt, Incarnation
from penstock.wire.handshake import NONCE_BYTES, FrontendHandshake
from penstock.wire.messages import Cancel, Release

__all__ = ["LinkClient", "LinkListener"]

_logger = logging.getLogger(__name__)

_MAX_DOUBLINGS = 16


class LinkClient:
    """The link to the worker at one address.

    Args:
        address: host:port of the worker's link. Raises ConfigError when it is not that.
        listener: told when the worker is up, what it says, and when it is down.
        frontend_id: this process; unique among the running frontends.
        expected: who must answer there, see Session; another one is treated as a refusal.
        starting: it may not listen yet, so that not to reach it is no warning before it was up once.
        rng: for the jitter of pauses.
        clock: for pauses and ticks.
    """

    def __init__(
        self,
        address: str,
        listener: LinkListener,
        settings: ClientSettings,
        *,
        frontend_id: str,
        expected: Incarnation | None = None,
        starting: bool = False,
        rng: random.Random | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.address = address
        self._host, self._port = split_address(address)
        self._listener = listener
        self._settings = settings
        self._frontend_id = frontend_id
        self._expected = expected
        self._knows_process = expected is not None and expected.epoch != 0
        self._starting = starting
        self._rng = rng or random.Random()
        self._clock = clock or MonotonicClock()
        self._session: Session | None = None
        self._reason = "not connected yet"  # why there is no session
        self._logged_reason = ""

    @property
    def up(self) -> bool:
        """Whether the worker can be sent to."""
        return self._session is not None and self._session.live

    @property
    def reason(self) -> str:
        """Why it is not up."""
        return self._reason

    @property
    def misled(self) -> bool:
        """Whether the last connection was cut here because of what the worker said."""
        return self._session is not None and self._session.connection.misled

    def cut(self, reason: str) -> None:
        """End the present connection, if there is one, as if it had broken; another follows."""
        if self._session is not None:
            self._session.connection.cut(reason)

    @property
    def fell_silent(self) -> bool:
        """Whether the last connection was cut here because nothing came any more."""
        return self._session is not None and self._session.fell_silent

    def generate(self, attempt: Attempt) -> int:
        """Send an attempt. Returns its `seq` on this connection, which `seen` in steps and heartbeats
        will reach. Raises RemoteError when down or when too much is waiting for the network, ProtocolError
        for an attempt longer than a frame."""
        return self._live_session().generate(attempt)

    def cancel(self, attempt_id: str) -> None:
        """End an attempt early. Raises RemoteError when down."""
        self._live_session().send(Cancel(attempt_id=attempt_id))

    def release(self, handoff_id: str, *, sent: bool) -> None:
        """Let the worker drop a handoff; `sent` as in wire/messages.py. Raises RemoteError when down."""
        self._live_session().send(Release(handoff_id=handoff_id, sent=sent))

    async def asset(self, sha256: str) -> bytes:
        """A file of the worker's card, by its SHA-256 in hex. Raises RemoteError when it cannot be had
        (down, unknown there, too long, too late, or not what its hash says)."""
        download = self._live_session().download(sha256)
        timeout_s = self._settings.asset_timeout_s
        await asyncio.wait([download.done], timeout=timeout_s)
        outcome = download.done.result() if download.done.done() else f"not here in {timeout_s:g} s"
        if isinstance(outcome, str):
            raise RemoteError(f"file {sha256} from {self.address}: {outcome}")
        return outcome

    async def run(self) -> None:
        """Keep the link up until cancelled, and then hang up; or until the worker has said goodbye."""
        failures = 0
        while True:
            session, refused, misled = None, False, False
            try:
                session = await self._serve_once()
                refused, misled = session.refused, session.connection.misled
            except Exception:  # a defect of ours must not end the links to the other workers
                _logger.exception("the link to %s broke because of an error in this process", self.address)
            if session is not None and session.orderly and self._knows_process:
                return  # this process has left for good; the next one has another epoch, and another link
            good = session is not None and session.live_s >= self._settings.retry_max_s and not misled
            failures = 0 if good else failures + 1
            await self._clock.sleep(self._pause_s(failures, refused, misled))

    def _pause_s(self, failures: int, refused: bool, misled: bool) -> float:
        """Whoever says what cannot be is tried less and less often, as long as it goes on like that."""
        settings = self._settings
        doublings = min(max(0, failures - 1), _MAX_DOUBLINGS)
        longest_s = settings.refused_retry_s if misled else settings.retry_max_s
        pause_s = min(settings.retry_min_s * 2**doublings, longest_s)
        return (settings.refused_retry_s if refused else pause_s) * self._rng.uniform(0.5, 1.0)

    def _live_session(self) -> Session:
        if self._session is None or not self._session.live:
            raise RemoteError(f"{self.address} is down: {self._reason}")
        return self._session

    async def _serve_once(self) -> Session:
        """Connect and stay until the connection has ended. The session tells how far it came."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        secrets_now = self._settings.secret.accepted()
        handshake = FrontendHandshake(secrets_now[0] if secrets_now else "", nonce, self._frontend_id)
        session = Session(self._settings, handshake, self._expected, self._listener)
        self._session = session  # before `on_up`, which may already send
        try:
            await self._connect(session)
        except (OSError, UnicodeError, ConfigError) as error:
            level = logging.INFO if self._starting else logging.WARNING
            self._log_down(f"cannot connect: {str(error) or 'timed out'}", level)
            return session
        try:
            async with asyncio.TaskGroup() as tasks:
                ticking = tasks.create_task(self._tick(session))
                reason = await asyncio.shield(session.connection.ended)
                ticking.cancel()
        finally:
            if not session.connection.ended.done():
                await self._leave(session)
        if session.was_live:  # whoever was told of its end logs it
            self._logged_reason, self._starting = "", False
        self._log_down(reason, logging.DEBUG if session.was_live else logging.WARNING)
        return session

    async def _leave(self, session: Session) -> None:
        session.leave("it needs this link no longer")
        await asyncio.wait([session.connection.ended], timeout=self._settings.close_timeout_s)
        session.connection.cut("closed here")
        await asyncio.shield(session.connection.ended)

    async def _connect(self, session: Session) -> None:
        settings = self._settings
        context = tls.renewed_client_context(settings.tls)() if settings.tls else None
        server_name = (settings.tls.server_name or self._host) if settings.tls else None
        async with asyncio.timeout(settings.connect_timeout_s):
            await asyncio.get_running_loop().create_connection(
                lambda: session.connection,
                self._host,
                self._port,
                ssl=context,
                server_hostname=server_name,
                ssl_shutdown_timeout=settings.close_timeout_s if context else None,
            )

    async def _tick(self, session: Session) -> None:
        while True:
            await self._clock.sleep(self._settings.ping_s)
            session.tick(self._settings.ping_s)

    def _log_down(self, reason: str, level: int = logging.WARNING) -> None:
        """Log a reason once, however often it comes back before the worker is up again."""
        self._reason = reason
        repeated = reason == self._logged_reason
        who = f"at {self.address}"
        if self._expected is not None:
            who = f"{self._expected.instance_id} {who}"
        _logger.log(logging.DEBUG if repeated else level, "worker %s is down: %s", who, reason)
        self._logged_reason = reason
