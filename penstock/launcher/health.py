"""A frontend's /health, and ports for frontends."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import ssl
from collections.abc import Container
from typing import Any
from urllib.parse import urlsplit

from penstock.errors import ConfigError

_BODY_BYTES_MAX = 1024 * 1024
_PORT_TRIES = 100
_PORT_MAX = 65535


async def fetch_health(url: str, timeout_s: float) -> dict[str, Any]:
    """The JSON of GET /health, whatever its HTTP status; `unreachable` as its status when there is none."""
    return await asyncio.to_thread(_fetch, url, timeout_s)


def is_healthy(health: dict[str, Any]) -> bool:
    return health.get("status") == "healthy"


def _fetch(url: str, timeout_s: float) -> dict[str, Any]:
    parts = urlsplit(url)
    connection = _connect(parts.scheme, parts.hostname or "", parts.port or 0, timeout_s)
    try:
        connection.request("GET", "/health")
        health = json.loads(connection.getresponse().read(_BODY_BYTES_MAX))
    except (OSError, http.client.HTTPException, ValueError) as error:
        return {"status": "unreachable", "error": str(error) or type(error).__name__}
    finally:
        connection.close()
    return health if isinstance(health, dict) else {"status": "unreachable", "error": "not an object"}


def _connect(scheme: str, host: str, port: int, timeout_s: float) -> http.client.HTTPConnection:
    if scheme != "https":
        return http.client.HTTPConnection(host, port, timeout=timeout_s)
    context = ssl.create_default_context()
    context.check_hostname = False  # our own child on this machine, whatever its certificate's name
    context.verify_mode = ssl.CERT_NONE
    return http.client.HTTPSConnection(host, port, timeout=timeout_s, context=context)


def choose_port(host: str, wanted: int) -> int:
    """`wanted` for a graph's first frontend; 0 for one that is free.

    Raises:
        ConfigError: it is in use, or the host is not this machine's.
    """
    try:
        return _try_port(host, wanted)
    except OSError as error:
        raise ConfigError(
            f"port {wanted} on {host}: {error.strerror}; choose another with --port"
        ) from error


def next_port(host: str, start: int, taken: Container[int]) -> int:
    """The first free port from `start` on. Raises ConfigError when there is none near."""
    for port in range(start, min(start + _PORT_TRIES, _PORT_MAX + 1)):
        if port not in taken:
            try:
                return _try_port(host, port)
            except OSError:
                continue
    raise ConfigError(f"no free port from {start} on for another frontend")


def _try_port(host: str, port: int) -> int:
    """Bind it for a moment. A port that lingers from a server just ended counts as free."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        port = listener.getsockname()[1]
    return port
