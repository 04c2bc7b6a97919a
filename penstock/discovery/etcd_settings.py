"""The address and credentials of etcd, and the times and limits of discovery with it."""

from __future__ import annotations

import ssl
from collections.abc import Callable

import msgspec

from penstock.errors import ConfigError


class EtcdSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of discovery in one namespace of one etcd cluster.

    endpoints: the members as `http://host:port` or `https://...`. A member is used until it fails.
    namespace: only instances in the same namespace find each other.
    user, password: the credentials; none if the user is empty.
    ca_file: the authorities that may sign members' certificates; the system's if empty.
    cert_file, key_file: the client certificate, if members require one.
    lease_s: an instance that does not renew its lease for this long is removed. Long enough for an election
        and a few retries. Frontends notice a worker's death earlier, by its link.
    watch_s: how often a watch is begun anew, with a new list. This limits how long the failure of a member
        that is frozen or cut off goes unnoticed.
    call_s: timeout of one call to one member, from connecting to the last byte.
    close_s: timeout of deregistering; after it, the lease runs out.
    retry_min_s, retry_max_s: pause after a failure; it doubles, and is jittered.
    instances_max: further instances are ignored, with a warning.
    value_bytes_max: a larger value is ignored, with a warning.
    reply_bytes_max: size limit of a reply, and of a message of a watch.
    """

    endpoints: tuple[str, ...]
    namespace: str = "default"
    user: str = ""
    password: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    lease_s: float = 10.0
    watch_s: float = 10.0
    call_s: float = 3.0
    close_s: float = 3.0
    retry_min_s: float = 0.2
    retry_max_s: float = 5.0
    instances_max: int = 1024
    value_bytes_max: int = 16 * 1024
    reply_bytes_max: int = 32 * 1024 * 1024

    @property
    def prefix(self) -> str:
        """The prefix of the keys of all instances."""
        return f"/penstock/{self.namespace}/instances/"

    @property
    def refresh_s(self) -> float:
        """A third of the lease: the lease is renewed up to three times before it would end."""
        return self.lease_s / 3

    def load_tls(self, context: ssl.SSLContext) -> None:
        """Load the files into a context, for new connections. Raises ConfigError with the flag's name."""
        if self.ca_file:
            _load("--etcd-ca", self.ca_file, lambda: context.load_verify_locations(self.ca_file))
        else:
            context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        if self.cert_file:
            _load("--etcd-key", self.key_file, lambda: None)
            _load(
                "--etcd-cert",
                self.cert_file,
                lambda: context.load_cert_chain(self.cert_file, self.key_file, lambda: ""),
            )


def _load(flag: str, path: str, load: Callable[[], None]) -> None:
    """Load a file. It is opened here first, since OpenSSL does not report which file it could not open."""
    try:
        with open(path, "rb"):
            pass
        load()
    except ssl.SSLError as error:
        raise ConfigError(f"{flag}: {path} is not usable: {error.reason or error}") from error
    except OSError as error:
        raise ConfigError(f"{flag}: cannot read {path}: {error.strerror}") from error
