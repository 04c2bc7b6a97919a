"""Free ports for processes that tests start."""

from __future__ import annotations

import random
import socket

# Below those that Linux itself gives to connections and listeners (net.ipv4.ip_local_port_range): none of
# them takes a port before the process that is being started does.
FIRST, LAST = 12_000, 29_000

_random = random.SystemRandom()  # others on this machine look for ports as well


def free_port() -> int:
    """A port of loopback on which nothing listens."""
    while True:
        port = _random.randrange(FIRST, LAST)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
