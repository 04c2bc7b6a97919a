"""The handoffs that may be pulled from here. Pure but for the lock and the keys.

A grant is open from `add`, being read from `begin` to `end`, and then gone; `retract` takes an open one
away. One that was begun is never open again, so a handoff is pulled at most once, and blocks that
`retract` let go are never read.
"""

from __future__ import annotations

import hmac
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.errors import RemoteError
from penstock.transfer.messages import PROTOCOL, Read

KEY_BYTES = 16


class ReadRefused(RemoteError):
    """A Read that is not granted, with the reason in words."""


@dataclass(frozen=True, slots=True)
class _Grant:
    key: bytes
    rows: tuple[int, ...]


class Grants:
    """One holder's grants. Bounded by its engine, which holds pool blocks for each. Thread-safe."""

    def __init__(self, instance_id: str, epoch: int, total_blocks: int, block_bytes: int) -> None:
        self._instance_id = instance_id
        self._epoch = epoch
        self._total_blocks = total_blocks
        self._block_bytes = block_bytes
        self._lock = threading.Lock()
        self._open: dict[str, _Grant] = {}
        self._reading: set[str] = set()

    def add(self, handoff_id: str, rows: Sequence[int]) -> bytes:
        """Let one reader have these pool rows. Returns its key."""
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
            ReadRefused: this Read is not for here, or its handoff is unknown, used or retracted.
        """
        if read.protocol != PROTOCOL:
            raise ReadRefused(f"speaks protocol {read.protocol}, not {PROTOCOL}")
        if (read.instance_id, read.epoch) != (self._instance_id, self._epoch):
            raise ReadRefused("that instance is not here, or is an earlier incarnation")
        if read.block_bytes != self._block_bytes:
            raise ReadRefused(f"blocks have {self._block_bytes} bytes here, {read.block_bytes} there")
        with self._lock:
            grant = self._open.get(read.handoff_id)
            # One answer for a wrong id and a wrong key: a stranger learns nothing.
            if grant is None or not hmac.compare_digest(grant.key, read.key):
                raise ReadRefused("no such handoff: pulled, retracted, expired or never made")
            count = len(grant.rows)
            if len(read.indices) > count or any(not 0 <= index < count for index in read.indices):
                raise ReadRefused(f"asks for blocks that are not among the handoff's {count}")
            del self._open[read.handoff_id]
            self._reading.add(read.handoff_id)
        return [grant.rows[index] for index in read.indices]

    def end(self, handoff_id: str) -> None:
        """A begun read is over, well or badly: its rows are not looked at any more."""
        with self._lock:
            self._reading.discard(handoff_id)

    def retract(self, handoff_id: str) -> bool:
        """Close an open grant. False while it is being read."""
        with self._lock:
            self._open.pop(handoff_id, None)
            return handoff_id not in self._reading
