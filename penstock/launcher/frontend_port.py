"""A frontend's port, which the launcher keeps open while frontend processes end and start.

The listening socket is the launcher's. Each frontend process inherits it, and several processes accept
from its one queue of connections (net/listening.py). So a connection waits while the frontend that will
accept it is being started.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

import msgspec

from penstock.net.listening import BACKLOG, INHERITED_VARIABLE, InheritedDescriptors, listen


class FrontendPort:
    """One port. It is open while something holds it.

    Args:
        port: 0 takes a free one.

    Raises:
        OSError: the port is in use, or the host is not this machine's.
    """

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self.socket = listen(host, port, BACKLOG)
        self.port: int = self.socket.getsockname()[1]
        self._holders: set[object] = set()

    def hold(self, holder: object) -> None:
        """Keep the port open until `holder` releases it; open it again if it is closed. Raises OSError."""
        if self.socket.fileno() < 0:
            self.socket = listen(self._host, self.port, BACKLOG)
        self._holders.add(holder)

    def release(self, holder: object) -> None:
        """Close the port if nothing else holds it. Releasing twice is harmless."""
        self._holders.discard(holder)
        if not self._holders:
            self.socket.close()


class InheritedSockets:
    """What one frontend process inherits, and the launcher's end of the channel to that process."""

    def __init__(self, port: FrontendPort, patience_s: float) -> None:
        """Raises OSError."""
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        self.descriptors = (port.socket.fileno(), self._theirs.fileno())
        inherited = InheritedDescriptors(*self.descriptors, patience_s)
        self.variables = {INHERITED_VARIABLE: msgspec.json.encode(inherited).decode()}

    def close_theirs(self) -> None:
        """Close the launcher's copy of the process's end. Call it once the process has been started."""
        self._theirs.close()

    async def ready(self) -> None:
        """Wait until the process reports that it serves the port; for ever if the process dies first."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            if await loop.sock_recv(self._ours, 1):
                return
        await loop.create_future()

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()
