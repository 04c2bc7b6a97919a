"""KV transfer over plain TCP: `messages.py` is the protocol, with the blocks' bytes after `Granted`.

The holder hands its pool's memory to the socket and the reader lets the socket fill its own pool's, so
no byte is copied in user space, and a system call moves many blocks. The blocks are kept until the last
byte is in the holder's socket: from then on it is the kernel that has them.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.transfer.base import KvTransferBase
from penstock.transfer.messages import Granted
from penstock.transfer.settings import TransferSettings
from penstock.transfer.stream import Stream, pool_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpTransferSettings(TransferSettings):
    """The common ones are all it needs."""


class TcpTransfer(KvTransferBase):
    """The `KvTransfer` port over TCP."""

    name = "tcp"

    def __init__(self, instance_id: str, epoch: int, settings: TcpTransferSettings | None = None) -> None:
        super().__init__(instance_id, epoch, settings or TcpTransferSettings())

    def _lend(self, stream: Stream, rows: list[int], deadline: float) -> None:
        stream.send(Granted(), deadline, more=True)
        stream.send_rows(pool_rows(self._flat, self.block_bytes, rows), deadline)

    def _fetch(self, stream: Stream, granted: Granted, rows: list[int], deadline: float) -> None:
        stream.receive_rows(pool_rows(self._flat, self.block_bytes, rows), deadline)
