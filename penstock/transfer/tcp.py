"""KV transfer over plain TCP. The protocol is in `messages.py`; the blocks' bytes follow `Granted`.

The holder passes its pool's memory to the socket, and the reader has the socket fill its own pool's memory.
So no byte is copied in user space, and one system call moves many blocks. The holder keeps the blocks until
the last byte is in its socket; from then on the kernel has a copy.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.shapes import Incarnation
from penstock.transfer.base import KvTransferBase
from penstock.transfer.messages import Granted
from penstock.transfer.settings import TransferSettings
from penstock.transfer.stream import Stream, pool_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpTransferSettings(TransferSettings):
    """TCP needs no further settings."""


class TcpTransfer(KvTransferBase):
    """The `KvTransfer` port over TCP."""

    name = "tcp"

    def __init__(self, incarnation: Incarnation, settings: TcpTransferSettings | None = None) -> None:
        super().__init__(incarnation, settings or TcpTransferSettings())

    def _lend(self, stream: Stream, rows: list[int], deadline: float) -> None:
        stream.send(Granted(), deadline, more=True)
        stream.send_rows(pool_rows(self._flat, self.block_bytes, rows), deadline)

    def _fetch(self, stream: Stream, granted: Granted, rows: list[int], deadline: float) -> None:
        stream.receive_rows(pool_rows(self._flat, self.block_bytes, rows), deadline)
