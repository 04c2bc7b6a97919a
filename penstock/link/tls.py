"""TLS contexts for both ends. Both ends are Penstock, so TLS 1.3 is the only version spoken.

Certificates and authorities may be renewed under a running process: each connection uses what stands in
the files when it begins, give or take a second.
"""

from __future__ import annotations

import functools
import ssl
from collections.abc import Callable
from pathlib import Path

from penstock.errors import ConfigError
from penstock.link.settings import TlsSettings
from penstock.net.renewed import Renewed


def server_context(tls: TlsSettings) -> ssl.SSLContext:
    """A worker's context; asks frontends for a certificate when `ca_file` is set. Raises ConfigError."""
    if not tls.cert_file:
        raise ConfigError("tls.cert_file: a worker needs a certificate")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # links last; and a session resumed would not show its certificate again
    _load_own(context, tls)
    if tls.ca_file:
        _load_authorities(context, tls)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def renewed_server_context(tls: TlsSettings) -> Callable[[], ssl.SSLContext]:
    """The same, from the files as they are now. Raises ConfigError when they cannot be used at first."""
    files = [Path(file) for file in (tls.cert_file, tls.key_file, tls.ca_file) if file]
    return Renewed("link certificate", files, lambda: server_context(tls)).get


@functools.cache
def renewed_client_context(tls: TlsSettings) -> Callable[[], ssl.SSLContext]:
    """A frontend's context, from the files as they are now; one for all links. Raises ConfigError when they
    cannot be used at first."""
    files = [Path(file) for file in (tls.cert_file, tls.key_file, tls.ca_file) if file]
    return Renewed("link certificate", files, lambda: client_context(tls)).get


def client_context(tls: TlsSettings) -> ssl.SSLContext:
    """A frontend's context; always verifies the worker and its name. Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if tls.key_file and not tls.cert_file:
        raise ConfigError("tls.key_file: a key is of no use without tls.cert_file")
    if tls.cert_file:
        _load_own(context, tls)
    if tls.ca_file:
        _load_authorities(context, tls)
    else:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    return context


def _load_own(context: ssl.SSLContext, tls: TlsSettings) -> None:
    _check_readable("tls.cert_file", tls.cert_file)
    if tls.key_file:
        _check_readable("tls.key_file", tls.key_file)
    names = "tls.cert_file and tls.key_file" if tls.key_file else "tls.cert_file"
    _load(names, lambda: context.load_cert_chain(tls.cert_file, tls.key_file or None, _no_password))


def _load_authorities(context: ssl.SSLContext, tls: TlsSettings) -> None:
    _check_readable("tls.ca_file", tls.ca_file)
    _load("tls.ca_file", lambda: context.load_verify_locations(tls.ca_file))


def _check_readable(name: str, path: str) -> None:
    """OpenSSL does not say which of its files it could not open."""
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise ConfigError(f"{name}: cannot read {path!r}: {error.strerror}") from error


def _load(names: str, load: Callable[[], None]) -> None:
    try:
        load()
    except ssl.SSLError as error:
        raise ConfigError(f"{names}: not usable: {error.reason or error}") from error


def _no_password() -> str:
    """Without this, OpenSSL would ask on the terminal for the password of an encrypted key."""
    return ""
