"""The buffers that NIXL's reads write to. From a buffer, the blocks are copied into the KV pool.

Reads do not write to the pool directly, because a posted read cannot be cancelled. UCX does not stop it,
even after its peer was unloaded: when a holder that was frozen resumes a minute later, its bytes are still
written here. (Seen with UCX over TCP in NIXL 1.5.1, where neither releasing the read nor unloading the peer
changed this.) In the pool, they would overwrite blocks that belong to another request by then. A buffer
whose read was abandoned is not used until that read has ended. The copy costs a tenth of a second per GiB.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np

from penstock.errors import RemoteError
from penstock.transfer.stream import DeadlinePassed

_STRANDED_POLL_S = 0.05  # between checks for ended reads, by a pull that waits for a buffer

IsOver = Callable[[], bool]


class Staging:
    """Buffers of equal size. Thread-safe.

    `memory` has shape (buffers, rows, block_bytes); a buffer is an index into its first axis.
    """

    def __init__(self, buffers: int, buffer_bytes: int, block_bytes: int) -> None:
        self.rows = max(1, buffer_bytes // block_bytes)
        self.memory = np.zeros((buffers, self.rows, block_bytes), np.uint8)
        self._changed = threading.Condition()
        self._free = list(range(buffers))
        self._stranded: dict[int, IsOver] = {}

    def take(self, deadline: float) -> int:
        """Take a buffer that nothing writes to. The caller must `give_back` or `strand` it.

        Raises:
            DeadlinePassed: all buffers were in use or stranded until the deadline.
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
        """Return a buffer whose reads have ended."""
        with self._changed:
            self._free.append(buffer)
            self._changed.notify()

    def strand(self, buffer: int, is_over: IsOver) -> None:
        """Return a buffer whose read was abandoned. It is not used until `is_over` returns True or raises
        RemoteError."""
        with self._changed:
            self._stranded[buffer] = is_over

    def stranded(self) -> int:
        """The number of buffers that abandoned reads may still write to."""
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
        return True  # the read has failed and writes nothing more
