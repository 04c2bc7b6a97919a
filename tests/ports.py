"""Free ports for processes that tests start."""

from __future__ import annotations

import random
import socket

# Below those that Linux itself gives to connections and listeners (net.ipv4.ip_local_port_range): none of
# them takes a port before the process that is being started does.
FIRST, LAST = 12_000, 29_000

_random = random.SystemRandom()  # others on this machine look for ports as well


def free_port() -> int:
    """A port of loopback on which nothing listens, and which no other test process is given meanwhile."""
    while True:
        port = _random.randrange(FIRST, LAST)
        with socket.socket() as listener, socket.socket(socket.AF_UNIX) as claim:
            try:
                listener.bind(("127.0.0.1", port))
                claim.bind(f"\0penstock-test-port-{port}")
            except OSError:
                continue
            claim.detach()  # open, and so the name taken, until this process ends
        return port
