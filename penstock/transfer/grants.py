"""The handoffs that readers may pull from this worker. Pure except for the lock and the keys.

A grant is open from `add` on, is being read from `begin` to `end`, and is then gone. `retract` removes an
open grant. A grant that was begun is never open again. So a handoff is pulled at most once, and blocks are
never read after `retract` has released them.
"""

from __future__ import annotations

import hmac
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.errors import RemoteError
from penstock.shapes import Incarnation
from penstock.transfer.messages import PROTOCOL, Read

KEY_BYTES = 16


class ReadRefused(RemoteError):
    """The holder does not grant a Read; the message says why."""


@dataclass(frozen=True, slots=True)
class _Grant:
    key: bytes
    rows: tuple[int, ...]


class Grants:
    """The grants of one holder. Their number is limited by its pool blocks. Thread-safe."""

    def __init__(self, incarnation: Incarnation, total_blocks: int, block_bytes: int) -> None:
        self._incarnation = incarnation
        self._total_blocks = total_blocks
        self._block_bytes = block_bytes
        self._lock = threading.Lock()
        self._open: dict[str, _Grant] = {}
        self._reading: set[str] = set()

    def add(self, handoff_id: str, rows: Sequence[int]) -> bytes:
        """Allow one reader to read these pool rows. Returns the key that the reader must show."""
        if any(not 0 <= row < self._total_blocks for row in rows):
            raise ValueError(f"handoff {handoff_id}: a block outside the pool of {self._total_blocks}")
        key = secrets.token_bytes(KEY_BYTES)
        with self._lock:
            if handoff_id in self._open or handoff_id in self._reading:
                raise ValueError(f"handoff {handoff_id} is exported already")
            self._open[handoff_id] = _Grant(key, tuple(rows))
        return key

    def begin(self, read: Read) -> list[int]:
        """Start a read; the caller must `end` it. Returns the pool rows in the order asked for.

        Raises:
            ReadRefused: the Read is for another instance, or its handoff is unknown, used or retracted.
        """
        if read.protocol != PROTOCOL:
            raise ReadRefused(f"the reader speaks protocol {read.protocol}, not {PROTOCOL}")
        if read.holder != self._incarnation:
            raise ReadRefused("the holder is another instance, or a later incarnation of it")
        if read.block_bytes != self._block_bytes:
            raise ReadRefused(
                f"blocks have {self._block_bytes} bytes at the holder, {read.block_bytes} at the reader"
            )
        with self._lock:
            grant = self._open.get(read.handoff_id)
            # The same answer for a wrong id and a wrong key, so that a stranger learns nothing.
            if grant is None or not hmac.compare_digest(grant.key, read.key):
                raise ReadRefused(
                    "no such handoff: it was pulled, was retracted, has expired or was never made"
                )
            count = len(grant.rows)
            if len(read.indices) > count or any(not 0 <= index < count for index in read.indices):
                raise ReadRefused(f"the reader asks for blocks outside the handoff's {count}")
            del self._open[read.handoff_id]
            self._reading.add(read.handoff_id)
        return [grant.rows[index] for index in read.indices]

    def end(self, handoff_id: str) -> None:
        """Record that a read which was begun has ended or failed: its rows are no longer read."""
        with self._lock:
            self._reading.discard(handoff_id)

    def retract(self, handoff_id: str) -> bool:
        """Remove an open grant. Returns False while the handoff is being read."""
        with self._lock:
            self._open.pop(handoff_id, None)
            return handoff_id not in self._reading
