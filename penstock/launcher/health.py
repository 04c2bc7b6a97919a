"""Fetches a frontend's /health."""

from __future__ import annotations

import asyncio
import http.client
import json
import ssl
from typing import Any
from urllib.parse import urlsplit

_BODY_BYTES_MAX = 1024 * 1024


async def fetch_health(url: str, timeout_s: float) -> dict[str, Any]:
    """The JSON of GET /health, whatever the HTTP status. Without an answer, its status is `unreachable`."""
    return await asyncio.to_thread(_fetch, url, timeout_s)


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
