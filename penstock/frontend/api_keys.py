"""API keys: who may use the frontend."""

from __future__ import annotations

import hmac
from collections.abc import Collection
from hashlib import sha256
from pathlib import Path

from penstock.errors import ConfigError, RequestRejected


class ApiKeys:
    """The keys of which a request must bring one. None at all lets everybody in."""

    def __init__(self, keys: Collection[str]) -> None:
        # Digests have one length, so comparing them tells nothing of a key, not even how long it is.
        self._digests = [sha256(key.encode()).digest() for key in keys]

    def check(self, authorization: bytes | None) -> None:
        """Raises RequestRejected(401) unless the `Authorization` header brings a key."""
        if not self._digests:
            return
        scheme, _, key = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer" or not key.strip():
            raise RequestRejected(
                401, "An API key is needed: `Authorization: Bearer KEY`.", code="missing_api_key"
            )
        digest = sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all: constant time
        if not any(matches):
            raise RequestRejected(401, "The API key is not valid.", code="invalid_api_key")


def read_api_keys(path: Path) -> frozenset[str]:
    """Keys from a file, one per line; empty lines and those that begin with `#` are skipped.

    Raises ConfigError when the file cannot be read or has no key: an empty file must not open the door.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"API keys: cannot read {path}: {error}") from None
    keys = frozenset(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"API keys: {path} has none")
    return keys
