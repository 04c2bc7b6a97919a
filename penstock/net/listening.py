"""Listening sockets, of ports and Unix sockets: made here, or inherited from Penstock's launcher.

The launcher holds the listening socket of a frontend's port, and each frontend process that it starts
inherits the socket. Connections wait in the socket's own queue, so that none is refused while one process
ends and the next one starts.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
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


class UnixListener:
    """A Unix socket under a path. Who may connect is decided by the process's umask and the folder."""

    def __init__(self, path: str, backlog: int, *, take_over: bool) -> None:
        """A socket file that no process listens on any more is replaced. `take_over`: so is any other; the
        process that has it keeps its connections. Raises OSError."""
        self._path = path
        if not take_over and _is_in_use(path):
            raise OSError(errno.EADDRINUSE, "another process listens on it")
        new = f"{path}.{os.getpid()}"  # renamed, so that there is a socket under the path at any time
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.socket.bind(new)
            self.socket.listen(backlog)
            self._identity = _identity(new)
            os.rename(new, path)
        except OSError:
            self.socket.close()
            with contextlib.suppress(OSError):
                os.unlink(new)
            raise

    def close(self) -> None:
        """Stop listening, and remove the file unless it is another process's by now."""
        self.socket.close()
        with contextlib.suppress(OSError):  # somebody else has removed it
            if _identity(self._path) == self._identity:
                os.unlink(self._path)


def _identity(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def _is_in_use(path: str) -> bool:
    """Whether a process listens there. Raises OSError for what is no socket."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "it exists and is no socket")
    except FileNotFoundError:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
        except BlockingIOError:  # its queue is full
            return True
    return True


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
