"""The value of --discovery: where workers are listed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from penstock.checked import shown
from penstock.errors import ConfigError
from penstock.net.address import PORT_MAX

DiscoveryKind = Literal["file", "etcd", "kubernetes"]

ETCD_PASSWORD_VARIABLE = "PENSTOCK_ETCD_PASSWORD"

_ETCD_MEMBER = re.compile(
    r"(?P<host>[-\w]{1,63}(\.[-\w]{1,63})*|\[[0-9a-fA-F:.]+\])(:(?P<port>[0-9]{1,5}))?", re.ASCII
)
_ETCD_PORT = 2379


class DiscoveryUrl(msgspec.Struct, frozen=True):
    """Where discovery is: a directory, etcd's members as `host:port,...`, or a Kubernetes namespace (empty:
    the default). `tls` is etcd's."""

    kind: DiscoveryKind
    location: str
    tls: bool = False


def parse_discovery(url: str) -> DiscoveryUrl:
    """`file:[DIRECTORY]`, `etcd://HOST:PORT[,...]` (`etcds://`: with TLS) or `kubernetes:[NAMESPACE]`.
    Raises ConfigError."""
    kind, colon, location = url.partition(":")
    if kind in ("etcd", "etcds") and "@" in location:  # no message may show what stands before it
        raise ConfigError(
            f"--discovery: a user belongs in --etcd-user and its password in {ETCD_PASSWORD_VARIABLE},"
            f" not in the address"
        )
    if kind in ("etcd", "etcds") and location.startswith("//") and len(location) > len("//"):
        members = [_etcd_member(member) for member in location.removeprefix("//").rstrip("/").split(",")]
        return DiscoveryUrl("etcd", ",".join(members), tls=kind == "etcds")
    if kind == "file" and colon:
        return DiscoveryUrl("file", location.removeprefix("//"))
    if kind == "kubernetes":
        return DiscoveryUrl("kubernetes", location.removeprefix("//"))
    raise ConfigError(f"--discovery: expected file:, etcd://HOST:PORT or kubernetes:, got {shown(url)}")


def _etcd_member(text: str) -> str:
    """`host:port` of one of etcd's members. Raises ConfigError."""
    match = _ETCD_MEMBER.fullmatch(text.strip())
    port = int((match and match["port"]) or _ETCD_PORT)
    if match is None or not 1 <= port <= PORT_MAX:
        raise ConfigError(f"--discovery: expected etcd://HOST:PORT[,HOST:PORT...], got {shown(text)}")
    return f"{match['host']}:{port}"


def discovery_directory(url: DiscoveryUrl, namespace: str, environ: Mapping[str, str]) -> Path:
    """The directory of a `file:` URL; without one, a place of this user's own on this machine."""
    if url.location:
        return Path(url.location).expanduser() / namespace
    own = Path(environ.get("XDG_RUNTIME_DIR") or "~/.cache").expanduser()
    return own / "penstock" / "discovery" / namespace
