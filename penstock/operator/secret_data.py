"""Reads and writes the data of Secrets. Users can edit Secrets, so their data may be invalid."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from penstock.kubernetes.api import Object
from penstock.kubernetes.kinds import SECRETS
from penstock.operator.certificates import Pair, made_at


def data_of(secret: Mapping[str, Any] | None) -> dict[str, bytes]:
    """The values of a Secret, without those that are not base64. Empty for None."""
    found = {}
    for key, value in ((secret or {}).get("data") or {}).items():
        try:
            found[key] = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            continue
    return found


def pair_of(data: Mapping[str, bytes], certificate: str, key: str) -> Pair | None:
    """The certificate and the private key under these names. None if one is missing, or the certificate is
    unreadable."""
    if not data.get(certificate) or not data.get(key):
        return None
    try:
        made_at(data[certificate])
    except ValueError:
        return None
    return Pair(data[certificate], data[key])


def secret_of(metadata: Object, data: Mapping[str, bytes]) -> Object:
    """A Secret with these values."""
    return {
        "apiVersion": SECRETS.api_version,
        "kind": SECRETS.name,
        "metadata": metadata,
        "type": "Opaque",
        "data": {key: base64.b64encode(value).decode() for key, value in sorted(data.items())},
    }
