"""Listening sockets: made here, or inherited from Penstock's launcher.

The launcher holds the listening socket of a frontend's port, and each frontend process that it starts
inherits the socket. Connections wait in the socket's own queue, so that none is refused while one process
ends and the next one starts.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import MutableMapping
from typing import Final

import msgspec

from penstock.errors import ConfigError

BACKLOG: Final = 2048  # connections that the kernel holds until a process accepts them
INHERITED_VARIABLE: Final = "PENSTOCK_LISTENER"


def listen(host: str, port: int, backlog: int | None = None) -> socket.socket:
    """A listening TCP socket; `::` takes IPv4 as well. Raises OSError, or OverflowError for no port."""
    ipv6 = ":" in host
    return socket.create_server(
        (host, port),
        family=socket.AF_INET6 if ipv6 else socket.AF_INET,
        backlog=backlog,
        dualstack_ipv6=ipv6 and host == "::" and socket.has_dualstack_ipv6(),
    )


class InheritedDescriptors(msgspec.Struct, frozen=True):
    """The value of PENSTOCK_LISTENER, as JSON.

    listener: descriptor of the listening socket.
    channel: descriptor of one end of a socket pair, to which the process writes a byte once it is ready.
    patience_s: how long the process may wait until it is ready before it accepts connections all the same.
    """

    listener: int
    channel: int
    patience_s: float


class InheritedListener:
    """A listening socket that the launcher holds as well."""

    def __init__(self, listener: socket.socket, channel: socket.socket, patience_s: float) -> None:
        self.socket = listener
        self.patience_s = patience_s
        self._channel = channel

    def report_ready(self) -> None:
        """Tell the launcher that this process accepts connections and serves requests."""
        with contextlib.suppress(OSError):  # the launcher is gone; this process will be killed
            self._channel.send(b"1")

    def close(self) -> None:
        self.socket.close()
        self._channel.close()


def inherited_listener(environ: MutableMapping[str, str]) -> InheritedListener | None:
    """The listening socket that `environ` names; None when it names none. The variable is removed.

    Raises:
        ConfigError: the variable is set, but does not name two sockets.
    """
    text = environ.pop(INHERITED_VARIABLE, "")
    if not text:
        return None
    try:
        inherited = msgspec.json.decode(text, type=InheritedDescriptors)
        listener, channel = (
            socket.socket(fileno=inherited.listener),
            socket.socket(fileno=inherited.channel),
        )
    except (msgspec.MsgspecError, OSError) as error:
        raise ConfigError(f"{INHERITED_VARIABLE}: {error}") from error
    for descriptor in (listener, channel):
        descriptor.set_inheritable(False)
    return InheritedListener(listener, channel, inherited.patience_s)
