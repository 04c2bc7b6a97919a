"""A frontend's port, held open here while processes come and go.

The listening socket is the launcher's. A process that serves it gets it by descriptor, and accepts from the
same queue as another one that serves it too (listening.py). So connections wait while one is started again
or follows another. They are refused when nobody will come for them soon: then no replica holds the port.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

import msgspec

from penstock.net.listening import BACKLOG, LOAN_VARIABLE, Loan, listen


class Listener:
    """One port. Replicas hold it while they may serve it; it listens while some replica does.

    Args:
        port: 0 takes a free one.

    Raises:
        OSError: the port is in use, or the host is not this machine's.
    """

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._socket: socket.socket | None = listen(host, port, BACKLOG)
        self._holders: set[object] = set()
        self._serving: set[object] = set()
        self.port: int = self._socket.getsockname()[1]

    def hold(self, holder: object) -> socket.socket:
        """The listening socket, open until `release`. Raises OSError."""
        if self._socket is None:
            self._socket = listen(self._host, self.port, BACKLOG)
        self._holders.add(holder)
        return self._socket

    def release(self, holder: object) -> None:
        """This one's processes will not serve it, not soon at least."""
        self._holders.discard(holder)
        self._serving.discard(holder)
        if self._socket is not None and not self._holders:
            self._socket.close()
            self._socket = None

    def serves(self, holder: object, now: bool) -> None:
        """Whether this one's process is ready to serve it."""
        (self._serving.add if now else self._serving.discard)(holder)

    def served_beside(self, holder: object) -> bool:
        """Whether another one's process is ready to serve it."""
        return bool(self._serving - {holder})


class Lending:
    """A listener lent to one process, and our end of the channel to it; listening.py has the other one."""

    def __init__(self, listener: socket.socket, patience_s: float) -> None:
        """Raises OSError."""
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        self.descriptors = (listener.fileno(), self._theirs.fileno())
        loan = Loan(*self.descriptors, patience_s)
        self.variables = {LOAN_VARIABLE: msgspec.json.encode(loan).decode()}

    def started(self) -> None:
        """The process has its own descriptors."""
        self._theirs.close()

    async def ready(self) -> None:
        """Wait until the process says that it serves the port; without end when it dies instead."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            if await loop.sock_recv(self._ours, 1):
                return
        await loop.create_future()

    def hand_over(self) -> None:
        """Tell the process that another one accepts from now on. It looks when it gets SIGTERM."""
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()
