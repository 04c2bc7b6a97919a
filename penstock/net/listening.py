"""Listening sockets: made here, or by whoever started this process and lent to it.

Penstock's launcher holds the socket of a frontend's port for as long as the port is wanted, and lends it to
one process after another, or to two at a time. Connections wait in the socket's own queue, so that none is
lost with a process, and none is refused between two of them. systemd does the same with the sockets of its
units (sd_listen_fds(3)).
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import MutableMapping
from typing import Final

import msgspec

from penstock.errors import ConfigError

BACKLOG: Final = 2048  # connections the kernel holds until they are accepted
LOAN_VARIABLE: Final = "PENSTOCK_LISTENER"

_SYSTEMD_PID, _SYSTEMD_COUNT = "LISTEN_PID", "LISTEN_FDS"
_SYSTEMD_FIRST_DESCRIPTOR = 3
_PATIENCE_S = 3.0  # where the lender names none


def listen(host: str, port: int, backlog: int | None = None) -> socket.socket:
    """A listening TCP socket; `::` takes IPv4 as well. Raises OSError, or OverflowError for no port."""
    ipv6 = ":" in host
    return socket.create_server(
        (host, port),
        family=socket.AF_INET6 if ipv6 else socket.AF_INET,
        backlog=backlog,
        dualstack_ipv6=ipv6 and host == "::" and socket.has_dualstack_ipv6(),
    )


class Loan(msgspec.Struct, frozen=True):
    """What the launcher lends, as JSON in PENSTOCK_LISTENER.

    listener: descriptor of the listening socket.
    channel: descriptor of one end of a socket pair. The process writes a byte to it once it is ready; its
        end of file, seen on SIGTERM, says that another process accepts from the same socket.
    patience_s: how long the process may wait to be ready before it accepts all the same.
    """

    listener: int
    channel: int
    patience_s: float


class LentListener:
    """The borrower's side of it."""

    def __init__(self, listener: socket.socket, channel: socket.socket | None, patience_s: float) -> None:
        self.socket = listener
        self.patience_s = patience_s
        self._channel = channel

    def tell_ready(self) -> None:
        """Connections are accepted, and requests are served."""
        if self._channel is not None:
            with contextlib.suppress(OSError):  # a lender that is gone takes this process with it
                self._channel.send(b"1")

    def has_successor(self) -> bool:
        """Whether another process accepts, so that this one need not."""
        if self._channel is None:
            return False
        try:
            return self._channel.recv(1, socket.MSG_DONTWAIT) == b""
        except OSError:
            return False

    def close(self) -> None:
        self.socket.close()
        if self._channel is not None:
            self._channel.close()


def borrow_listener(environ: MutableMapping[str, str], pid: int) -> LentListener | None:
    """What was lent to the process `pid`, which is this one; None: nothing. The variables are removed.

    Raises:
        ConfigError: the variables are set, and what they name is not one listening TCP socket.
    """
    text = environ.pop(LOAN_VARIABLE, "")
    if text:
        try:
            loan = msgspec.json.decode(text, type=Loan)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{LOAN_VARIABLE}: {error}") from error
        listener = _listener(LOAN_VARIABLE, loan.listener)
        return LentListener(listener, _socket(LOAN_VARIABLE, loan.channel), loan.patience_s)
    count = environ.get(_SYSTEMD_COUNT, "")
    if not count or environ.get(_SYSTEMD_PID) != str(pid):
        return None
    del environ[_SYSTEMD_COUNT], environ[_SYSTEMD_PID]
    if count != "1":
        raise ConfigError(f"{_SYSTEMD_COUNT}: expected one socket, got {count}")
    return LentListener(_listener(_SYSTEMD_COUNT, _SYSTEMD_FIRST_DESCRIPTOR), None, _PATIENCE_S)


def _listener(variable: str, descriptor: int) -> socket.socket:
    lent = _socket(variable, descriptor)
    tcp = lent.family in (socket.AF_INET, socket.AF_INET6) and lent.type == socket.SOCK_STREAM
    if not (tcp and lent.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)):
        lent.detach()
        raise ConfigError(f"{variable}: descriptor {descriptor} is no listening TCP socket")
    return lent


def _socket(variable: str, descriptor: int) -> socket.socket:
    try:
        os.set_inheritable(descriptor, False)
        return socket.socket(fileno=descriptor)
    except OSError as error:
        raise ConfigError(f"{variable}: descriptor {descriptor}: {error.strerror}") from error
