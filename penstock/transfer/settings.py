"""What can be set about moving KV, and the limits of everything in it that could grow or wait."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from penstock.errors import ConfigError

TIMEOUT_MAX_S = 3600.0  # far beyond any transfer, and what every operating system's timers can count
_MAX_PORT = 65_535


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferSettings:
    """What every transport that listens on a TCP port has."""

    host: str = "127.0.0.1"
    """IP address of the interface to listen on."""

    port: int = 0
    """TCP port; 0 lets the system choose."""

    advertise_host: str = ""
    """IP address that readers dial. Empty: `host`, which then must not be a wildcard. No names: looking
    one up has no deadline, and a pull does."""

    advertise_port: int = 0
    """TCP port that readers dial, where a port mapping changes it. 0: the one listened on."""

    max_connections: int = 64
    """Readers connected at once, one thread each. One more drops the connection that has been idle
    longest, those that never showed a valid key first."""

    max_pulls: int = 8
    """Pulls under way at once, one thread each."""

    max_waiting_pulls: int = 256
    """Pulls waiting for one of those threads. Any more fail at once."""

    max_idle_connections: int = 64
    """Connections kept open towards holders for the next pull; the one unused longest is closed."""

    connect_timeout_s: float = 5.0
    """For TCP to be established; a pull's own deadline may be nearer."""

    request_timeout_s: float = 5.0
    """For a new connection's first request to be here, whole."""

    idle_timeout_s: float = 60.0
    """For the next request on a connection that has shown a valid key."""

    read_timeout_s: float = 60.0
    """Longest that one read may keep its blocks here, whatever the reader asks for. A reader that dies
    unseen or stops taking bytes holds them this long."""

    stop_timeout_s: float = 5.0
    """For each thread to end once everything it could wait for is closed."""

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
            raise ConfigError(f"transfer: with host {self.host}, set advertise_host to what readers dial")

    @property
    def dialled_host(self) -> str:
        """The IP address in this holder's handoffs."""
        return self.advertise_host or self.host


def _ip_address(name: str, text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        raise ConfigError(f"transfer: {name} must be an IP address, got {text!r}") from None
