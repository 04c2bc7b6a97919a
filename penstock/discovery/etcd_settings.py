"""Where etcd is, how to get in, and how long everything there may take."""

from __future__ import annotations

import ssl
from collections.abc import Callable

import msgspec

from penstock.errors import ConfigError


class EtcdSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One etcd cluster, as one namespace uses it.

    endpoints: its members as `http://host:port` or `https://...`; the first that answers is used, until it
        no longer does.
    namespace: only instances of the same namespace meet.
    user, password: none when the user is empty.
    ca_file: authorities that members' certificates must come from; the system's when empty.
    cert_file, key_file: own certificate, where members ask for one.
    lease_s: an instance that has not been heard of for this long is gone from the list. Long enough for an
        election and a few tries; a worker's death is noticed sooner, by its link.
    watch_s: a watch is begun anew this often, with a fresh list: the longest that a silent end (a frozen
        member, one cut off from the others) goes unnoticed.
    call_s: for one call to one member, from connecting to the last byte.
    close_s: for deregistering; the lease ends by itself if that was not enough.
    retry_min_s, retry_max_s: pause after a failure; doubles, and is jittered.
    instances_max: instances beyond this many are ignored, with a warning.
    value_bytes_max: a larger value is garbage.
    reply_bytes_max: the longest reply, and the longest message of a watch, that is read.
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
        """Under it, one key for each instance."""
        return f"/penstock/{self.namespace}/instances/"

    @property
    def refresh_s(self) -> float:
        """Three chances to refresh the lease before it is over."""
        return self.lease_s / 3

    def load_tls(self, context: ssl.SSLContext) -> None:
        """The files into a context, for its next connections. Raises ConfigError, naming the flag."""
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
    """OpenSSL does not say which of its files it could not open, so each is opened here first."""
    try:
        with open(path, "rb"):
            pass
        load()
    except ssl.SSLError as error:
        raise ConfigError(f"{flag}: {path} is not usable: {error.reason or error}") from error
    except OSError as error:
        raise ConfigError(f"{flag}: cannot read {path}: {error.strerror}") from error
