"""The buffers that one-sided reads go to, before what they brought is copied into the pool.

Why not straight into the pool: a posted read cannot be taken back. UCX neither cancels it nor, once its
peer is forgotten, stops it: a holder that was frozen and wakes a minute later still has its bytes written
here (seen with UCX over TCP in NIXL 1.5.1, where releasing the read, and forgetting the peer, changed
nothing). Into the pool they would fall on blocks that belong to another request by then. A buffer whose
read was given up is left alone until that read has ended; the copy costs a tenth of a second a GiB.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np

from penstock.errors import RemoteError
from penstock.transfer.stream import DeadlinePassed

_STRANDED_POLL_S = 0.05  # between looks at given-up reads by a pull that waits for their buffers

IsOver = Callable[[], bool]


class Staging:
    """Equal buffers of some rows each. Thread-safe.

    `memory` has shape (buffers, rows, block_bytes); a buffer is an index into its first axis.
    """

    def __init__(self, buffers: int, buffer_bytes: int, block_bytes: int) -> None:
        self.rows = max(1, buffer_bytes // block_bytes)
        self.memory = np.zeros((buffers, self.rows, block_bytes), np.uint8)
        self._changed = threading.Condition()
        self._free = list(range(buffers))
        self._stranded: dict[int, IsOver] = {}

    def take(self, deadline: float) -> int:
        """A buffer that nothing writes to; `give_back` or `strand` it.

        Raises:
            DeadlinePassed: all were in use or stranded for so long.
        """
        with self._changed:
            while not self._free:
                self._reclaim()
                left_s = deadline - time.monotonic()
                if not self._free and left_s <= 0:
                    count = len(self._stranded)
                    raise DeadlinePassed(f"no staging buffer in time ({count} wait for frozen holders)")
                if not self._free:
                    self._changed.wait(min(left_s, _STRANDED_POLL_S))
            return self._free.pop()

    def give_back(self, buffer: int) -> None:
        """Its reads have ended."""
        with self._changed:
            self._free.append(buffer)
            self._changed.notify()

    def strand(self, buffer: int, is_over: IsOver) -> None:
        """Its read was given up; nobody has it until `is_over` answers True or raises RemoteError."""
        with self._changed:
            self._stranded[buffer] = is_over

    def stranded(self) -> int:
        """Buffers whose given-up reads may still write."""
        with self._changed:
            self._reclaim()
            return len(self._stranded)

    def _reclaim(self) -> None:
        for buffer, is_over in list(self._stranded.items()):
            if _has_ended(is_over):
                del self._stranded[buffer]
                self._free.append(buffer)


def _has_ended(is_over: IsOver) -> bool:
    try:
        return is_over()
    except RemoteError:
        return True  # failed for good: nothing comes of it any more
