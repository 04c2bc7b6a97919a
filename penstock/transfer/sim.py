"""The simulated KV transfer, for simulated engines: it moves blocks between pools of one process, and takes
the time that a transfer between machines would take.

A holder sends to its readers one after the other. So the pulls from a busy prefill worker queue up, as they
do at a real network card. As the port demands, an offer is for one reader, and can be withdrawn until the
reader has begun. All bytes of a pull are copied at its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock

import msgspec

from penstock.clock import Clock
from penstock.errors import ConfigError
from penstock.ports import Pulled
from penstock.shapes import Handoff


class SimTransferSettings(msgspec.Struct, frozen=True):
    """The simulated network."""

    bytes_per_block: int = 4 * 1024 * 1024
    """Size of a KV block: 16 tokens of a 32B model, at 256 KiB a token."""

    gigabytes_per_s: float = 40.0
    """Bandwidth of one holder; a 400 Gb/s InfiniBand port gives 40 in practice."""

    setup_ms: float = 1.0
    """Time before the first byte of each pull, in ms; 0.5 to 2 over RDMA."""

    def __post_init__(self) -> None:
        if self.bytes_per_block <= 0 or not self.gigabytes_per_s > 0 or self.setup_ms < 0:
            raise ConfigError(f"bytes, bandwidth and time of a transfer must be positive: {self}")

    def sent_at(self, size_bytes: int, now: float, busy_until: float) -> float:
        """When bytes that are asked for now have been sent, by a holder that sends others until
        `busy_until`. Times in seconds."""
        return max(now + self.setup_ms / 1e3, busy_until) + size_bytes / (self.gigabytes_per_s * 1e9)


class SimNetwork:
    """The transfers of one simulation, by address."""

    def __init__(self) -> None:
        self.holders: dict[str, SimTransfer] = {}

    def pull_s(self, holder: str, reader: str, seconds: float) -> float:
        """The duration of a pull from `holder` to `reader` that takes `seconds` on a good network.
        Simulations of faults override this; with infinity, the pull ends by its timeout."""
        return seconds


@dataclass(frozen=True, slots=True)
class SimTransferStatistics:
    """How much one end of the transfers keeps at the moment."""

    offers: int  # handoffs that a reader may pull from here
    reads: int  # handoffs that a reader is pulling from here
    pulls: int  # pulls from elsewhere to here that have not ended


class SimTransfer:
    """The transfer of one worker. Make it on the event loop that will run pulls and callbacks.

    Args:
        address: unique in `network`.
        clock: the clock on which pulls take their time.
    """

    name = "sim"

    def __init__(
        self, settings: SimTransferSettings, network: SimNetwork, address: str, clock: Clock
    ) -> None:
        self._settings = settings
        self._network = network
        self._address = address
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._pool = memoryview(b"")  # flat
        self._row_bytes = 0
        self._lock = Lock()  # guards the next two: engines call from their threads
        self._offers: dict[str, Sequence[int]] = {}  # block ids by handoff id
        self._reading: dict[str, SimTransfer] = {}  # the reader, by handoff id
        self._sends_until = 0.0  # when the last pull from this holder, of those so far, will end
        self._on_pulled: Callable[[str], None] = _ignore
        self._tasks: set[asyncio.Task[str | None]] = set()

    def start(self, pool: memoryview, on_pulled: Callable[[str], None]) -> None:
        """As KvTransfer.start."""
        self._on_pulled = on_pulled
        self._pool = pool.cast("B")
        self._row_bytes = pool.nbytes // max(1, len(pool))
        self._network.holders[self._address] = self

    def export(self, handoff_id: str, block_ids: Sequence[int]) -> tuple[str, bytes]:
        """As KvTransfer.export."""
        with self._lock:
            self._offers[handoff_id] = list(block_ids)
        return self._address, b""

    def retract(self, handoff_id: str) -> bool:
        """As KvTransfer.retract."""
        with self._lock:
            self._offers.pop(handoff_id, None)
            return handoff_id not in self._reading

    def pull(
        self,
        handoff: Handoff,
        source_indices: Sequence[int],
        block_ids: Sequence[int],
        timeout_s: float,
        on_done: Callable[[Pulled], None],
    ) -> None:
        """As KvTransfer.pull."""
        pull = partial(self._spawn, handoff, list(source_indices), list(block_ids), timeout_s, on_done)
        self._loop.call_soon_threadsafe(pull)

    def statistics(self) -> SimTransferStatistics:
        """Counts as of now."""
        return SimTransferStatistics(len(self._offers), len(self._reading), len(self._tasks))

    def stop(self) -> None:
        """As KvTransfer.stop: pulls from here and to here fail."""
        self._network.holders.pop(self._address, None)
        self._loop.call_soon_threadsafe(self._cancel)

    def kill(self) -> None:
        """End as if the process had died: nothing is reported here, and holders end what it was reading."""
        self._network.holders.pop(self._address, None)
        for holder in self._network.holders.values():
            for handoff_id in [it for it, reader in holder._reading.items() if reader is self]:
                holder._end(handoff_id)

    def _cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    def _spawn(
        self,
        handoff: Handoff,
        sources: list[int],
        targets: list[int],
        timeout_s: float,
        on_done: Callable[[Pulled], None],
    ) -> None:
        began = self._clock.now()

        def finish(task: asyncio.Task[str | None]) -> None:
            self._tasks.discard(task)
            error = "stopped" if task.cancelled() else task.result()
            moved = 0 if error else len(targets)
            seconds = self._clock.now() - began
            on_done(Pulled(moved, moved * self._settings.bytes_per_block, seconds, error))

        task = self._loop.create_task(self._transfer(handoff, sources, targets, timeout_s))
        self._tasks.add(task)
        task.add_done_callback(finish)

    async def _transfer(
        self, handoff: Handoff, sources: list[int], targets: list[int], timeout_s: float
    ) -> str | None:
        """Run a pull. Returns why it failed, or None."""
        holder = self._network.holders.get(handoff.address)
        if holder is None:
            return f"no holder at {handoff.address}"
        offered = holder._begin(handoff.handoff_id, self)
        if offered is None:
            return f"{handoff.address} does not offer {handoff.handoff_id}"
        try:
            seconds = holder._send_s(len(targets) * self._settings.bytes_per_block)
            seconds = self._network.pull_s(handoff.address, self._address, seconds)
            await self._clock.sleep(min(seconds, timeout_s))
            if seconds > timeout_s:
                return f"not done within {timeout_s:g} s"
            if self._network.holders.get(handoff.address) is not holder:
                return f"{handoff.address} stopped"
            for source, target in zip(sources, targets, strict=True):
                self._row(target)[:] = holder._row(offered[source])
        finally:
            holder._end(handoff.handoff_id)
        holder._on_pulled(handoff.handoff_id)
        return None

    # --- called by the reader -----------------------------------------------------------------------

    def _begin(self, handoff_id: str, reader: SimTransfer) -> Sequence[int] | None:
        """Begin a read: the offered blocks, or None if there is no such offer."""
        with self._lock:
            offered = self._offers.pop(handoff_id, None)
            if offered is not None:
                self._reading[handoff_id] = reader
            return offered

    def _end(self, handoff_id: str) -> None:
        with self._lock:
            self._reading.pop(handoff_id, None)

    def _row(self, block_id: int) -> memoryview:
        return self._pool[block_id * self._row_bytes : (block_id + 1) * self._row_bytes]

    def _send_s(self, size_bytes: int) -> float:
        """Seconds from now until this many bytes have been sent, after those that are being sent
        already."""
        now = self._clock.now()
        self._sends_until = self._settings.sent_at(size_bytes, now, self._sends_until)
        return self._sends_until - now


def _ignore(handoff_id: str) -> None:
    """The callback before `start`, when nothing can be pulled."""
