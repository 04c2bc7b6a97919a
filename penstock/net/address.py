"""Addresses as text: `host:port`, with an IPv6 host in brackets."""

from __future__ import annotations

import ipaddress

from penstock.errors import ConfigError

PORT_MAX = 65535


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port`. Raises ConfigError."""
    host, colon, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ConfigError(f"address {address!r}: an IPv6 host needs brackets, as in [::1]:9000")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) <= PORT_MAX):
        raise ConfigError(f"address {address!r} is not host:port")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """The text that `split_address` reads."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def unix_socket_path(url: str) -> str:
    """The path in `unix:/PATH` or `unix:///PATH`; empty for another URL."""
    return url.removeprefix("unix:").removeprefix("//") if url.startswith("unix:") else ""


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to a server that listens on this host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
