"""The holder's TCP server: one thread accepts connections, and one thread serves each connection."""

from __future__ import annotations

import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable

from penstock.errors import ConfigError, PenstockError
from penstock.logs.quiet_log import QuietLog
from penstock.net.address import join_address
from penstock.transfer.messages import Read
from penstock.transfer.settings import TransferSettings
from penstock.transfer.stream import ConnectionLost, DeadlinePassed, Stream

log = QuietLog(logging.getLogger(__name__))

_BACKLOG = 128
_PAUSE_S = 0.5  # after a failed accept, for example without file descriptors: some may be closed meanwhile

Serve = Callable[[Stream, Read], bool]


class _ReaderConnection:
    """A reader's connection."""

    def __init__(self, stream: Stream, peer: str) -> None:
        self.stream = stream
        self.peer = peer
        self.thread: threading.Thread | None = None
        self.trusted = False  # whether the reader has shown a valid key
        self.busy = False  # from a Read to the end of its answer
        self.idle_since = time.monotonic()


class Server:
    """Listens, and calls `serve(stream, read)` for each Read on the connection's thread.

    `serve` returns whether the Read was granted. If it raises PenstockError, the connection is closed.
    """

    def __init__(self, settings: TransferSettings, serve: Serve) -> None:
        self._settings = settings
        self._serve = serve
        self._lock = threading.Lock()
        self._connections: set[_ReaderConnection] = set()
        self._stopping = False
        self._acceptor: threading.Thread | None = None

    def start(self) -> str:
        """Listen. Returns the address that readers connect to.

        Raises:
            ConfigError: the port is not available.
        """
        host, port = self._settings.host, self._settings.port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        except OSError as error:
            raise ConfigError(f"transfer: cannot listen on {host} port {port}: {error.strerror}") from error
        self._listener.setblocking(False)
        self._waker, self._wakes = socket.socketpair()
        self._acceptor = threading.Thread(target=self._accept_forever, name="kv-accept", daemon=True)
        self._acceptor.start()
        listening: int = self._listener.getsockname()[1]
        return join_address(self._settings.dialled_host, self._settings.advertise_port or listening)

    def stop(self) -> None:
        """Close all connections, and wait for their threads."""
        if self._acceptor is None or self._stopping:
            return
        self._stopping = True
        self._waker.send(b"\0")
        self._acceptor.join(self._settings.stop_timeout_s)
        for closing in (self._listener, self._waker, self._wakes):
            closing.close()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.stream.cut()
        for connection in connections:
            if connection.thread is not None:
                connection.thread.join(self._settings.stop_timeout_s)

    def _accept_forever(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wakes, selectors.EVENT_READ)
            while not self._stopping:
                selector.select()
                try:
                    accepted, address = self._listener.accept()
                except BlockingIOError:
                    continue  # woken to stop, or the connection was gone before it was taken
                except OSError as error:
                    log.warning("transfer: cannot accept a connection: %s", error.strerror)
                    time.sleep(_PAUSE_S)
                    continue
                self._admit(accepted, f"{address[0]}:{address[1]}")

    def _admit(self, accepted: socket.socket, peer: str) -> None:
        if not self._make_room():
            accepted.close()
            return
        try:
            connection = _ReaderConnection(Stream(accepted), peer)
        except ConnectionLost:
            return  # reset before it was looked at
        connection.thread = threading.Thread(
            target=self._converse, args=(connection,), name="kv-holder", daemon=True
        )
        with self._lock:
            self._connections.add(connection)
        try:
            connection.thread.start()
        except RuntimeError as error:  # the system has no thread left to give
            log.warning("transfer: cannot serve %s: %s", peer, error)
            self._forget(connection)

    def _make_room(self) -> bool:
        """Whether one more connection may be accepted. If there are too many, closes the idle one that is
        least useful: untrusted connections first, then the one idle longest."""
        with self._lock:
            if len(self._connections) < self._settings.max_connections:
                return True
            idle = [connection for connection in self._connections if not connection.busy]
        if not idle:
            return False
        dropped = min(idle, key=lambda connection: (connection.trusted, connection.idle_since))
        dropped.stream.cut()
        if dropped.thread is not None:
            dropped.thread.join(self._settings.stop_timeout_s)
        return True

    def _converse(self, connection: _ReaderConnection) -> None:
        try:
            while not self._stopping:
                self._exchange(connection)
        except (ConnectionLost, DeadlinePassed) as error:
            log.debug("transfer: reader %s: %s", connection.peer, error)
        except PenstockError as error:
            log.info("transfer: closed the connection of %s: %s", connection.peer, error)
        except Exception:
            # A bug ends this connection only, not those of other readers.
            log.exception("transfer: serving %s failed", connection.peer)
        finally:
            self._forget(connection)

    def _forget(self, connection: _ReaderConnection) -> None:
        with self._lock:
            self._connections.discard(connection)
        connection.stream.close()

    def _exchange(self, connection: _ReaderConnection) -> None:
        settings = self._settings
        patience_s = settings.idle_timeout_s if connection.trusted else settings.request_timeout_s
        read = connection.stream.receive(Read, time.monotonic() + patience_s)
        connection.busy = True
        try:
            granted = self._serve(connection.stream, read)
        finally:
            connection.idle_since = time.monotonic()
            connection.busy = False
        connection.trusted = connection.trusted or granted
