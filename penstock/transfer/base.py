"""The base class of the transports `tcp` and `nixl`: one pull, on both sides, except for moving the bytes.

The reader asks for blocks, fetches them, and waits for the holder's confirmation that it kept them; it does
so on a thread of the pull queue. The holder grants the read, has the blocks read, and ends the grant; it
does so on the connection's thread.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

from penstock.errors import PenstockError, RemoteError
from penstock.ports import Pulled
from penstock.shapes import Handoff, Incarnation
from penstock.transfer.connections import Connections
from penstock.transfer.grants import Grants, ReadRefused
from penstock.transfer.messages import PROTOCOL, Granted, Read, StillHeld
from penstock.transfer.pull_queue import PullQueue, QueuedPull
from penstock.transfer.server import Server
from penstock.transfer.settings import TIMEOUT_MAX_S, TransferSettings
from penstock.transfer.stream import ConnectionLost, Stream

log = logging.getLogger(__name__)


class KvTransferBase(ABC):
    """The `KvTransfer` port, without moving the bytes: subclasses implement `_lend` and `_fetch`.

    Args:
        incarnation: of the worker whose KV pool this serves; its handoffs name it as their holder.
    """

    name: str

    def __init__(self, incarnation: Incarnation, settings: TransferSettings) -> None:
        self.incarnation = incarnation
        self.settings = settings
        self.stopping = False
        self._server = Server(settings, self._serve)
        self._connections = Connections(settings)
        self._pulls = PullQueue(settings.max_pulls, settings.max_waiting_pulls)

    def start(self, pool: memoryview, on_pulled: Callable[[str], None]) -> None:
        """See `KvTransfer.start`. Raises ConfigError when the port is not available."""
        check_pool(pool)
        self.total_blocks, self.block_bytes = pool.shape or (0, 0)
        self._flat = pool.cast("B")
        self._on_pulled = on_pulled
        self._grants = Grants(self.incarnation, self.total_blocks, self.block_bytes)
        self.address = self._server.start()
        self._pulls.start()

    def export(self, handoff_id: str, block_ids: Sequence[int]) -> tuple[str, bytes]:
        """See `KvTransfer.export`."""
        return self.address, self._grants.add(handoff_id, block_ids)

    def retract(self, handoff_id: str) -> bool:
        """See `KvTransfer.retract`."""
        return self._grants.retract(handoff_id)

    def pull(
        self,
        handoff: Handoff,
        source_indices: Sequence[int],
        block_ids: Sequence[int],
        timeout_s: float,
        on_done: Callable[[Pulled], None],
    ) -> None:
        """See `KvTransfer.pull`."""
        indices, rows = list(source_indices), list(block_ids)
        if len(indices) != len(rows) or any(not 0 <= row < self.total_blocks for row in rows):
            raise ValueError("a pull needs one own block for each source block")
        now = time.monotonic()
        deadline = now + min(timeout_s, TIMEOUT_MAX_S)
        run = partial(self._run, handoff, indices, rows, now, deadline)
        self._pulls.submit(QueuedPull(run, on_done, now, deadline))

    def stop(self) -> None:
        """See `KvTransfer.stop`."""
        self.stopping = True
        self._connections.close()
        self._pulls.stop(self.settings.stop_timeout_s)
        self._server.stop()

    @abstractmethod
    def _lend(self, stream: Stream, rows: list[int], deadline: float) -> None:
        """The holder's part: send the grant for these pool rows, and return once they have been read."""

    @abstractmethod
    def _fetch(self, stream: Stream, granted: Granted, rows: list[int], deadline: float) -> None:
        """The reader's part: copy the granted blocks to these pool rows. Writes nothing after it
        returns."""

    def _run(
        self, handoff: Handoff, indices: list[int], rows: list[int], started: float, deadline: float
    ) -> Pulled:
        error = None
        try:
            self._pull_once(handoff, indices, rows, deadline)
        except PenstockError as failed:
            error = str(failed)
        except Exception as failed:
            # A bug must not end this thread, nor leave the caller without the result that it waits for.
            log.exception("transfer: pulling %s failed", handoff.handoff_id)
            error = f"internal error: {failed!r}"
        blocks = 0 if error else len(rows)
        return Pulled(blocks, blocks * self.block_bytes, time.monotonic() - started, error)

    def _pull_once(self, handoff: Handoff, indices: list[int], rows: list[int], deadline: float) -> None:
        if handoff.transport != self.name:
            raise RemoteError(
                f"the handoff is for transport {handoff.transport[:20]!r}, this worker has {self.name!r}"
            )
        stream, granted = self._ask(handoff, indices, deadline)
        if granted.refused:
            self._connections.keep(handoff.address, stream)
            raise ReadRefused(f"refused by the holder: {granted.refused}")
        try:
            self._fetch(stream, granted, rows, deadline)
            stream.receive(StillHeld, deadline)
        except BaseException:
            self._connections.drop(stream)
            raise
        self._connections.keep(handoff.address, stream)

    def _ask(self, handoff: Handoff, indices: list[int], deadline: float) -> tuple[Stream, Granted]:
        """Send the Read over a connection kept from an earlier pull if there is one, and receive the grant.

        The holder may just have closed a kept connection; then the Read is sent again over a new one. If
        the first Read arrived nevertheless, the holder refuses the second, since it grants each handoff
        once.
        """
        stream = self._connections.reuse(handoff.address)
        if stream is not None:
            try:
                return stream, self._request(stream, handoff, indices, deadline)
            except ConnectionLost:
                pass
        stream = self._connections.open(handoff.address, deadline)
        return stream, self._request(stream, handoff, indices, deadline)

    def _request(self, stream: Stream, handoff: Handoff, indices: list[int], deadline: float) -> Granted:
        read = Read(
            PROTOCOL,
            handoff.handoff_id,
            handoff.holder,
            handoff.params,
            self.block_bytes,
            indices,
            deadline - time.monotonic(),
        )
        try:
            stream.send(read, deadline)
            return stream.receive(Granted, deadline)
        except BaseException:
            self._connections.drop(stream)
            raise

    def _serve(self, stream: Stream, read: Read) -> bool:
        """The holder's part of one pull. Returns whether the Read was granted."""
        deadline = time.monotonic() + min(read.timeout_s, self.settings.read_timeout_s)
        try:
            rows = self._grants.begin(read)
        except ReadRefused as refused:
            stream.send(Granted(refused=str(refused)), deadline)
            return False
        try:
            self._lend(stream, rows, deadline)
            self._pulled(read.handoff_id)
        finally:
            self._grants.end(read.handoff_id)
        # Sent last, so that the holder has recorded the pull before the reader reports its success.
        stream.send(StillHeld(), deadline)
        return True

    def _pulled(self, handoff_id: str) -> None:
        try:
            self._on_pulled(handoff_id)
        except Exception:
            # A bug of the engine: the reader has the blocks nevertheless.
            log.exception("transfer: on_pulled failed for %s", handoff_id)


def check_pool(pool: memoryview) -> None:
    """Raises ValueError if the pool is not as `KvTransfer.start` requires."""
    if pool.readonly or pool.ndim != 2 or pool.format != "B" or not pool.c_contiguous:
        raise ValueError("a pool is writable, C-contiguous, of format 'B' and two dimensions")
