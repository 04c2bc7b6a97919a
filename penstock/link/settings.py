"""What can be set about a link, and the limits of everything in it that could grow or wait."""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.errors import ConfigError
from penstock.link.secret import LinkSecret
from penstock.wire import frames

_MIB = 1024 * 1024
_MAX_PORT = 65_535


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsSettings:
    """Files of one side's certificate, all PEM. The same shape serves workers and frontends."""

    cert_file: str = ""
    """Own certificate, with its chain. A worker needs one; a frontend where workers ask for it."""

    key_file: str = ""
    """Private key of `cert_file`, not encrypted. Empty: it is in the same file."""

    ca_file: str = ""
    """Authorities that the other side's certificate must come from. On a worker, setting it makes
    TLS mutual; on a frontend, empty means the system's authorities."""

    server_name: str = ""
    """Frontend only: the name a worker's certificate must carry. Empty: the host of its address, which
    seldom is in a certificate where workers are found by IP address."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _LinkSettings:
    """What both ends have."""

    secret: LinkSecret = field(default_factory=LinkSecret)
    """Shared by all workers and frontends; none: open to whoever can connect, for loopback."""

    tls: TlsSettings | None = None
    """None: plain TCP."""

    handshake_timeout_s: float = 5.0
    """From connected to Welcome; on a worker, the same again before it for TLS. A handshake is two round
    trips; more is a peer that will not speak."""

    snapshot_timeout_s: float = 60.0
    """From Welcome to the last part of the snapshot: 1 GB/s moves a million hashes in 10 ms, a shaped
    10 Mbit/s line in 8 s."""

    close_timeout_s: float = 1.0
    """For the last bytes to leave on an orderly close; then the connection is cut."""

    max_frame_bytes: int = frames.MAX_FRAME_BYTES
    """Longest message in either direction."""

    max_unsent_bytes: int = 32 * _MIB
    """Most that may wait for the network to one peer; beyond, that peer is cut. More than one frame, and
    a minute of the largest worker's steps, so only a reader that has stopped gets there."""

    max_pending_assets: int = 8
    """Files asked for and not yet there, per connection. A model has about five."""

    def __post_init__(self) -> None:
        for name in ("handshake_timeout_s", "snapshot_timeout_s", "close_timeout_s", "max_pending_assets"):
            _positive(self, name)
        if not 1 <= self.max_frame_bytes <= self.max_unsent_bytes:
            raise ConfigError("link: max_frame_bytes must be at least 1 and at most max_unsent_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings(_LinkSettings):
    """A worker's end."""

    host: str = "127.0.0.1"
    """Interface to listen on."""

    port: int = 0
    """TCP port; 0 lets the system choose."""

    heartbeat_s: float = 0.5
    """Between heartbeats, and how often deadlines are checked. A fifth of a frontend's `silence_s`."""

    peer_timeout_s: float = 10.0
    """Nothing heard from a frontend for this long: its connection is cut and its attempts are ended.
    Longer than a frontend's own patience, since its requests are lost with it."""

    max_peers: int = 64
    """Frontends connected at once. Each gets every step."""

    snapshot_part_blocks: int = 16_384
    """Hashes in one message of the snapshot: a quarter of a millisecond to encode, 144 KiB. A large cache
    leaves in parts, so that nobody's tokens wait for all of it."""

    max_handshakes: int = 32
    """Connections that have not proved themselves, and as many whose TLS handshake has not ended. A further
    one drops the oldest, so that silent connections cannot keep others out."""

    def __post_init__(self) -> None:
        _LinkSettings.__post_init__(self)
        for name in (
            "heartbeat_s",
            "peer_timeout_s",
            "max_peers",
            "snapshot_part_blocks",
            "max_handshakes",
        ):
            _positive(self, name)
        if not 0 <= self.port <= _MAX_PORT:
            raise ConfigError(f"link: port must be 0 to {_MAX_PORT}")
        if self.peer_timeout_s < 2 * self.heartbeat_s:
            raise ConfigError("link: peer_timeout_s must be at least twice heartbeat_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSettings(_LinkSettings):
    """A frontend's end."""

    connect_timeout_s: float = 5.0
    """For TCP and TLS to be established."""

    ping_s: float = 0.25
    """Between pings, and how often deadlines are checked."""

    silence_s: float = 2.5
    """Nothing heard from a worker for this long, or nothing of what was sent has arrived there: it is down
    (frozen, or cut off, even in one direction only). Five heartbeats; found out at most `ping_s` later,
    and so within 3 s. On a slow line something arrives all the time, and the link stays."""

    retry_min_s: float = 0.1
    """First pause before connecting again; doubles with each failure. All pauses are jittered."""

    retry_max_s: float = 2.0
    """Longest pause before connecting again, and how long a connection must last to count as good."""

    refused_retry_s: float = 30.0
    """Pause after a handshake that failed (secret, version, not a worker): only a person mends that."""

    asset_timeout_s: float = 60.0
    """For one file."""

    max_asset_bytes: int = 64 * _MIB
    """Longest file taken from a worker. Large tokenizers have 35 MB."""

    max_assets_bytes: int = 256 * _MIB
    """All files taken over one connection: those of a model, several times over."""

    max_snapshot_blocks: int = 16 * _MIB
    """Most hashes taken from a worker: far above any cache (a million blocks are 16 million tokens)."""

    def __post_init__(self) -> None:
        _LinkSettings.__post_init__(self)
        for name in (
            "connect_timeout_s",
            "ping_s",
            "retry_min_s",
            "refused_retry_s",
            "asset_timeout_s",
            "max_asset_bytes",
            "max_assets_bytes",
            "max_snapshot_blocks",
        ):
            _positive(self, name)
        if self.silence_s < 2 * self.ping_s:
            raise ConfigError("link: silence_s must be at least twice ping_s")
        if self.retry_max_s < self.retry_min_s:
            raise ConfigError("link: retry_max_s must be at least retry_min_s")


def _positive(settings: _LinkSettings, name: str) -> None:
    if not getattr(settings, name) > 0:
        raise ConfigError(f"link: {name} must be greater than 0")
