"""The settings and limits of the KV transfer."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from penstock.errors import ConfigError

TIMEOUT_MAX_S = 3600.0  # far longer than any transfer, and in the range of every system's timers
_MAX_PORT = 65_535


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferSettings:
    """The settings of every transport that listens on a TCP port."""

    host: str = "127.0.0.1"
    """IP address of the interface to listen on."""

    port: int = 0
    """TCP port; 0 lets the system choose."""

    advertise_host: str = ""
    """IP address that readers connect to. Empty: `host`, which then must not be a wildcard. Not a name: a
    pull has a deadline, and looking up a name has none."""

    advertise_port: int = 0
    """TCP port that readers connect to, if a port mapping changes it. 0: the port listened on."""

    max_connections: int = 64
    """Most connected readers, with one thread each. When one more connects, the
    connection that has been idle longest is closed; connections that never showed a valid key go first."""

    max_pulls: int = 8
    """Most pulls under way at once, with one thread each."""

    max_waiting_pulls: int = 256
    """Most pulls that wait for a thread. Further pulls fail at once."""

    max_idle_connections: int = 64
    """Most idle connections to holders that are kept for later pulls. The one unused longest is closed."""

    connect_timeout_s: float = 5.0
    """Timeout of connecting. The deadline of a pull may be earlier."""

    request_timeout_s: float = 5.0
    """Timeout for the whole first request of a new connection."""

    idle_timeout_s: float = 60.0
    """Timeout for the next request on a connection that has shown a valid key."""

    read_timeout_s: float = 60.0
    """Longest time for which a read may keep blocks, even if the reader asks for more. A reader that stops
    taking bytes, or dies unnoticed, keeps them for this long."""

    stop_timeout_s: float = 5.0
    """Timeout for each thread to end, after all that it could wait for was closed."""

    def __post_init__(self) -> None:
        for name in (
            "max_connections",
            "max_pulls",
            "max_waiting_pulls",
            "max_idle_connections",
            "connect_timeout_s",
            "request_timeout_s",
            "idle_timeout_s",
            "read_timeout_s",
            "stop_timeout_s",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"transfer: {name} must be greater than 0")
            if name.endswith("_s") and getattr(self, name) > TIMEOUT_MAX_S:
                raise ConfigError(f"transfer: {name} must be at most {TIMEOUT_MAX_S:g}")
        for name in ("port", "advertise_port"):
            if not 0 <= getattr(self, name) <= _MAX_PORT:
                raise ConfigError(f"transfer: {name} must be 0 to {_MAX_PORT}")
        _ip_address("host", self.host)
        if _ip_address("advertise_host", self.dialled_host).is_unspecified:
            raise ConfigError(
                f"transfer: with host {self.host}, set advertise_host to the address for readers"
            )

    @property
    def dialled_host(self) -> str:
        """The IP address that this holder's handoffs contain."""
        return self.advertise_host or self.host


def _ip_address(name: str, text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        raise ConfigError(f"transfer: {name} must be an IP address, got {text!r}") from None
