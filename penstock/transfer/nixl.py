"""KV transfer through NIXL: RDMA between hosts that have it, copies between processes on one host.

The protocol is in `messages.py`. The holder's answer says where the blocks are, the reader reads them from
the holder's memory, and at the end the holder confirms that it still kept them. These messages go over a
TCP connection of their own. NIXL's notifications would have to be polled on both sides, which costs either
CPU time while idle or latency, and they cannot report that the other end has died.

With an agent's metadata, a peer can read the whole pool of the agent's worker. So the key guards against
mistakes and strangers, but not against another worker of the same deployment.

Where UCX finds neither shared memory nor RDMA, it emulates reads over TCP; then `tcp` is several times
faster. `UCX_TLS` and the other variables of UCX apply.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.errors import ConfigError, PenstockError, ProtocolError, RemoteError
from penstock.shapes import Incarnation
from penstock.transfer.base import KvTransferBase, check_pool
from penstock.transfer.messages import Done, Granted, Memory
from penstock.transfer.nixl_agent import Agent, Descriptors
from penstock.transfer.nixl_staging import Staging
from penstock.transfer.settings import TransferSettings
from penstock.transfer.stream import DeadlinePassed, Stream

log = logging.getLogger(__name__)

_POLL_MIN_S = 20e-6  # between checks whether a read has ended: a small read takes as long
_POLL_MAX_S = 1e-3

# Agents with reads that may still write: neither they nor their staging may be freed before the process is.
_undead: list[tuple[Agent, Staging]] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class NixlTransferSettings(TransferSettings):
    """The common settings, and those of NIXL."""

    progress_interval_s: float = 0.01
    """Longest sleep of NIXL's progress thread. Events wake the thread; this limit covers events that UCX
    misses. When idle, 1 ms costs 2 % of a core, 10 ms costs 0.4 %."""

    staging_buffers: int = 16
    """Number of buffers that reads write to: one for each pull under way, the others for abandoned
    reads."""

    staging_bytes: int = 2 * 1024 * 1024
    """Size of each buffer, at least one block. Small enough to stay in a core's cache until it is
    copied."""

    max_peers: int = 1024
    """Most holders whose agents are kept loaded. The one unused longest is unloaded."""

    def __post_init__(self) -> None:
        TransferSettings.__post_init__(self)
        for name in ("progress_interval_s", "staging_buffers", "staging_bytes", "max_peers"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"transfer: {name} must be greater than 0")
        if self.staging_buffers < self.max_pulls or self.max_peers < self.max_pulls:
            raise ConfigError("transfer: staging_buffers and max_peers must be at least max_pulls")


class NixlTransfer(KvTransferBase):
    """The `KvTransfer` port over NIXL."""

    name = "nixl"

    def __init__(self, incarnation: Incarnation, settings: NixlTransferSettings | None = None) -> None:
        self._nixl_settings = settings or NixlTransferSettings()
        super().__init__(incarnation, self._nixl_settings)
        self._agent: Agent | None = None

    def start(self, pool: memoryview, on_pulled: Callable[[str], None]) -> None:
        """See `KvTransfer.start`. Raises ConfigError when NIXL or the port is not available."""
        check_pool(pool)
        settings = self._nixl_settings
        self._pool: NDArray[np.uint8] = np.asarray(pool)
        self._staging = Staging(settings.staging_buffers, settings.staging_bytes, self._pool.shape[1])
        name = f"{self.incarnation.instance_id}-{self.incarnation.epoch}-{secrets.token_hex(4)}"
        self._agent = Agent(name, settings.progress_interval_s, settings.host)
        self._agent.register(self._pool)
        self._agent.register(self._staging.memory)
        self._metadata = self._agent.metadata()
        self._peers = _Peers(self._agent, settings.max_peers)
        super().start(pool, on_pulled)

    def stop(self) -> None:
        """See `KvTransfer.stop`."""
        super().stop()
        if self._agent is None:
            return
        stranded = self._staging.stranded()
        if stranded:
            log.warning("transfer: %d abandoned reads have not ended; keeping their memory", stranded)
            _undead.append((self._agent, self._staging))
        else:
            self._agent.close()
        self._agent = None

    def _lend(self, stream: Stream, rows: list[int], deadline: float) -> None:
        assert self._agent is not None
        address = self._pool.ctypes.data
        memory = Memory(self._agent.name, self._metadata, address, self.total_blocks, rows)
        stream.send(Granted(memory=memory), deadline)
        stream.receive(Done, deadline)

    def _fetch(self, stream: Stream, granted: Granted, rows: list[int], deadline: float) -> None:
        memory = granted.memory
        if memory is None or len(memory.rows) != len(rows):
            raise ProtocolError("the holder did not give the address of every block")
        if any(not 0 <= row < memory.total_blocks for row in memory.rows):
            raise ProtocolError("the holder names blocks outside its pool")
        if rows:
            self._peers.enter(memory.agent, memory.metadata)
            self._copy_all(memory, rows, deadline)
        stream.send(Done(), deadline)

    def _copy_all(self, memory: Memory, rows: list[int], deadline: float) -> None:
        """Read and copy the rows, one buffer at a time. The caller has entered the peer."""
        staging = self._staging
        try:
            buffer = staging.take(deadline)
        except PenstockError:
            self._peers.leave(memory.agent)
            raise
        read = 0
        try:
            for start in range(0, len(rows), staging.rows):
                theirs = memory.rows[start : start + staging.rows]
                read = self._post(memory, theirs, buffer)
                self._wait(read, deadline)
                self._pool[rows[start : start + staging.rows]] = staging.memory[buffer, : len(theirs)]
        except DeadlinePassed:
            staging.strand(buffer, lambda: self._has_ended(read, memory.agent))
            raise
        except BaseException as error:
            # A failed read has ended: UCX fails all reads from an endpoint, and then drops the endpoint.
            staging.give_back(buffer)
            self._peers.leave(memory.agent, failed=isinstance(error, RemoteError))
            raise
        staging.give_back(buffer)
        self._peers.leave(memory.agent)

    def _post(self, memory: Memory, theirs: list[int], buffer: int) -> int:
        assert self._agent is not None
        own_address = self._staging.memory[buffer].ctypes.data
        own = _descriptors(own_address, range(len(theirs)), self.block_bytes)
        return self._agent.post(memory.agent, own, _descriptors(memory.address, theirs, self.block_bytes))

    def _wait(self, read: int, deadline: float) -> None:
        assert self._agent is not None
        pause_s = _POLL_MIN_S
        while not self._agent.is_done(read):
            if time.monotonic() >= deadline or self.stopping:
                raise DeadlinePassed("the holder's memory could not be read in time")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _POLL_MAX_S)

    def _has_ended(self, read: int, peer: str) -> bool:
        """Whether an abandoned read has ended. Its peer stays in use until then."""
        assert self._agent is not None
        try:
            ended = self._agent.is_done(read)
        except RemoteError:
            self._peers.leave(peer, failed=True)
            raise
        if ended:
            self._peers.leave(peer)
        return ended


@dataclass(slots=True)
class _Peer:
    reads: int = 0  # pulls and abandoned reads that use the peer
    failed: bool = False


class _Peers:
    """The holders' agents that are loaded in this process. Thread-safe.

    A peer that failed is unloaded, and so is the least recently used one of too many, but never while a
    read uses it.
    """

    def __init__(self, agent: Agent, max_peers: int) -> None:
        self._agent = agent
        self._max_peers = max_peers
        self._lock = threading.Lock()
        self._peers: OrderedDict[str, _Peer] = OrderedDict()  # by agent name, used last at the end

    def enter(self, name: str, metadata: bytes) -> None:
        """Load this peer unless it is loaded, and keep it loaded until `leave`. Raises RemoteError."""
        with self._lock:
            peer = self._peers.get(name)
            if peer is None:
                self._make_room()
                self._agent.add_peer(name, metadata)
                peer = self._peers[name] = _Peer()
            peer.reads += 1
            self._peers.move_to_end(name)

    def leave(self, name: str, *, failed: bool = False) -> None:
        """End one use of a peer. If it has `failed`, it is loaded anew the next time."""
        with self._lock:
            peer = self._peers[name]
            peer.reads -= 1
            peer.failed = peer.failed or failed
            if peer.failed and not peer.reads:
                self._remove(name)

    def _make_room(self) -> None:
        if len(self._peers) < self._max_peers:
            return
        unused = next((name for name, peer in self._peers.items() if not peer.reads), None)
        if unused is None:
            raise RemoteError(f"reads from {len(self._peers)} holders are under way already")
        self._remove(unused)

    def _remove(self, name: str) -> None:
        del self._peers[name]
        try:
            self._agent.remove_peer(name)
        except RemoteError as error:
            log.warning("transfer: %s", error)


def _descriptors(address: int, rows: range | list[int], row_bytes: int) -> Descriptors:
    descriptors = np.zeros((len(rows), 3), np.uint64)
    descriptors[:, 0] = np.asarray(rows, np.uint64) * np.uint64(row_bytes) + np.uint64(address)
    descriptors[:, 1] = row_bytes
    return descriptors
