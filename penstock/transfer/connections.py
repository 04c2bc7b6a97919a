"""The reader's TCP connections. They are kept open between pulls, so that a pull costs one round trip."""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections import OrderedDict

from penstock.errors import ConfigError, RemoteError
from penstock.net.address import split_address
from penstock.transfer.settings import TransferSettings
from penstock.transfer.stream import ConnectionLost, DeadlinePassed, Stream


class Connections:
    """The connections to holders, idle and busy. Thread-safe."""

    def __init__(self, settings: TransferSettings) -> None:
        self._settings = settings
        # The holder closes idle connections after idle_timeout_s. Half of it avoids using one that is being
        # closed.
        self._useful_s = settings.idle_timeout_s / 2
        self._lock = threading.Lock()
        self._idle: OrderedDict[Stream, tuple[str, float]] = OrderedDict()  # address, since; oldest first
        self._busy: set[Stream] = set()
        self._closed = False

    def reuse(self, address: str) -> Stream | None:
        """The idle connection to this holder that was used last; None if there is none."""
        with self._lock:
            found = next((s for s in reversed(self._idle) if self._idle[s][0] == address), None)
            if found is None:
                return None
            _, since = self._idle.pop(found)
            if time.monotonic() - since < self._useful_s and not found.is_stale():
                self._busy.add(found)
                return found
        found.close()
        return None

    def open(self, address: str, deadline: float) -> Stream:
        """A new connection.

        Raises:
            RemoteError: nothing listens at the address, or the holder did not answer in time.
        """
        host, port = _host_and_port(address)
        left_s = min(deadline - time.monotonic(), self._settings.connect_timeout_s)
        if left_s <= 0:
            raise DeadlinePassed("the deadline passed")
        try:
            stream = Stream(socket.create_connection((host, port), timeout=left_s))
        except TimeoutError as error:
            raise DeadlinePassed(f"cannot connect to {address} within {left_s:.1f} s") from error
        except OSError as error:
            raise ConnectionLost(f"cannot connect to {address}: {error.strerror or error}") from error
        with self._lock:
            if not self._closed:
                self._busy.add(stream)
                return stream
        stream.close()
        raise ConnectionLost("the transfer was stopped")

    def keep(self, address: str, stream: Stream) -> None:
        """Keep a connection, whose exchange is complete, for the next pull."""
        useless = []
        with self._lock:
            self._busy.discard(stream)
            if self._closed:
                useless.append(stream)
            else:
                now = time.monotonic()
                self._idle[stream] = (address, now)
                # Connections to holders that are gone are not reused; they are removed here.
                while len(self._idle) > self._settings.max_idle_connections or self._outdated(now):
                    useless.append(self._idle.popitem(last=False)[0])
        for old in useless:
            old.close()

    def _outdated(self, now: float) -> bool:
        """Whether the connection that was used longest ago is too old to be used again."""
        _, since = next(iter(self._idle.values()))
        return now - since >= self._useful_s

    def drop(self, stream: Stream) -> None:
        """Close a connection whose exchange was interrupted: the meaning of its next bytes is unknown."""
        with self._lock:
            self._busy.discard(stream)
        stream.close()

    def close(self) -> None:
        """Close the idle connections and end the busy ones. None is opened afterwards."""
        with self._lock:
            self._closed = True
            for stream in self._busy:
                stream.cut()
            for stream in self._idle:
                stream.close()
            self._idle.clear()


def _host_and_port(address: str) -> tuple[str, int]:
    try:
        host, port = split_address(address)
        return str(ipaddress.ip_address(host)), port
    except (ConfigError, ValueError):
        raise RemoteError(f"not an IP address and port: {address[:60]!r}") from None
