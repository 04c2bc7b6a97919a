"""The Secrets by which the processes of a graph trust each other: a shared secret, and certificates for
mutual TLS.

Three Secrets for each graph:

    GRAPH-link-ca        the certificate authority and its key; no pod mounts this
    GRAPH-link-worker    the shared secret, a server certificate, and the trusted authorities
    GRAPH-link-frontend  the shared secret, a client certificate, and the trusted authorities

Processes read the mounted files again when they change, so a renewed certificate needs no restart. An
authority is replaced in two steps: for a day all processes trust its successor, before the successor signs
anything. A Secret that was deleted is made again, as far as possible from the other two, so that running
processes and new ones still trust each other.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from datetime import datetime, timedelta

from penstock.kubernetes.api import Object
from penstock.operator import names
from penstock.operator.certificates import (
    Pair,
    bundle,
    due_at,
    is_due,
    is_signed_by,
    made_at,
    new_authority,
    new_certificate,
)
from penstock.operator.secret_data import data_of, pair_of, secret_of

_ANNOUNCED = timedelta(days=1)  # kubelets bring a changed Secret into pods within two minutes
_SECRET_BYTES = 32


def secret_names(graph: str) -> tuple[str, str, str]:
    """The names of the Secrets of the authority, the workers and the frontends."""
    authority, worker, frontend = (names.link_secret(graph, side) for side in ("ca", "worker", "frontend"))
    return authority, worker, frontend


def link_secrets(graph: str, current: Mapping[str, Object], now: datetime) -> list[Object]:
    """The three Secrets as they should be now. They equal `current` if nothing is due.

    Args:
        current: the existing Secrets, by name. Missing or unreadable parts are made anew.
    """
    own, worker, frontend = (data_of(current.get(name)) for name in secret_names(graph))
    shared = own.get("secret") or worker.get("secret") or frontend.get("secret")
    shared = shared or secrets.token_hex(_SECRET_BYTES).encode()
    authority, following = _authorities(graph, own, now)
    known = [authority.certificate, following.certificate if following else b""]
    known += [own.get("trusted.crt", b""), worker.get("ca.crt", b""), frontend.get("ca.crt", b"")]
    trusted = bundle(known, now)
    kept = {
        "secret": shared,
        "trusted.crt": trusted,
        "ca.crt": authority.certificate,
        "ca.key": authority.key,
    }
    if following is not None:
        kept |= {"next.crt": following.certificate, "next.key": following.key}
    mounted = [
        {"secret": shared, "ca.crt": trusted}
        | _certificate(found, authority, f"{graph} {role}", hosts, trusted, now)
        for found, role, hosts in ((worker, "worker", [names.LINK_SERVER_NAME]), (frontend, "frontend", []))
    ]
    return [
        secret_of({"name": name}, data)
        for name, data in zip(secret_names(graph), [kept, *mounted], strict=True)
    ]


def next_due_at(objects: list[Object]) -> datetime:
    """The time at which the next of these certificates must be renewed."""
    data = [data_of(item) for item in objects]
    times = [due_at(one["tls.crt"]) for one in data if "tls.crt" in one]
    # An authority whose successor was announced needs no renewal: the successor replaces it.
    times += [due_at(one["ca.crt"]) for one in data if "ca.key" in one and "next.crt" not in one]
    times += [made_at(one["next.crt"]) + _ANNOUNCED for one in data if "next.crt" in one]
    return min(times)


def _authorities(graph: str, data: Mapping[str, bytes], now: datetime) -> tuple[Pair, Pair | None]:
    """The authority that signs now, and its announced successor, if any."""
    authority = pair_of(data, "ca.crt", "ca.key")
    following = pair_of(data, "next.crt", "next.key")
    if authority is None:
        return following or new_authority(f"{graph} link", now), None
    if following is not None and now >= made_at(following.certificate) + _ANNOUNCED:
        return following, None
    if following is None and is_due(authority.certificate, now):
        following = new_authority(f"{graph} link", now)
    return authority, following


def _certificate(
    data: Mapping[str, bytes], authority: Pair, name: str, hosts: list[str], trusted: bytes, now: datetime
) -> dict[str, bytes]:
    """A process's certificate: the present one, unless it is due or no trusted authority signed it."""
    found = pair_of(data, "tls.crt", "tls.key")
    trusts = [b"-----BEGIN" + part for part in trusted.split(b"-----BEGIN")[1:]]
    usable = found is not None and any(is_signed_by(found.certificate, one) for one in trusts)
    if found is None or not usable or is_due(found.certificate, now):
        found = new_certificate(authority, name, hosts, now)
    return {"tls.crt": found.certificate, "tls.key": found.key}
