"""The KV transfer on an event queue: it takes time, and moves nothing.

As in transfer/sim.py, a holder sends to its readers one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from penstock.ports import Pulled
from penstock.shapes import Handoff
from penstock.simulate.events import EventQueue
from penstock.transfer.sim import SimTransferSettings


class SimulatedTransfer:
    """The transfer of one worker. Implements KvTransfer.

    Args:
        holders: all transfers of this simulation, by address.
    """

    name = "sim"

    def __init__(
        self,
        settings: SimTransferSettings,
        events: EventQueue,
        address: str,
        holders: dict[str, SimulatedTransfer],
    ) -> None:
        self._settings = settings
        self._events = events
        self._address = address
        self._holders = holders
        self._sends_until = 0.0
        self._offers: set[str] = set()
        self._reading: set[str] = set()
        self._on_pulled: Callable[[str], None]

    def start(self, pool: memoryview, on_pulled: Callable[[str], None]) -> None:
        """As KvTransfer.start."""
        self._on_pulled = on_pulled
        self._holders[self._address] = self

    def export(self, handoff_id: str, block_ids: Sequence[int]) -> tuple[str, bytes]:
        """As KvTransfer.export."""
        self._offers.add(handoff_id)
        return self._address, b""

    def retract(self, handoff_id: str) -> bool:
        """As KvTransfer.retract."""
        self._offers.discard(handoff_id)
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
        holder = self._holders[handoff.address]
        if handoff.handoff_id not in holder._offers:
            error = f"{handoff.address} does not offer {handoff.handoff_id}"
            self._events.after(0.0, partial(on_done, Pulled(0, 0, 0.0, error)))
            return
        holder._offers.discard(handoff.handoff_id)
        holder._reading.add(handoff.handoff_id)
        size_bytes = len(block_ids) * self._settings.bytes_per_block
        now = self._events.now()
        holder._sends_until = holder._settings.sent_at(size_bytes, now, holder._sends_until)
        seconds = holder._sends_until - now
        if seconds > timeout_s:
            pulled = Pulled(0, 0, timeout_s, f"not done within {timeout_s:g} s")
        else:
            pulled = Pulled(len(block_ids), size_bytes, seconds, None)
        self._events.after(pulled.seconds, partial(self._done, holder, handoff.handoff_id, pulled, on_done))

    def _done(
        self, holder: SimulatedTransfer, handoff_id: str, pulled: Pulled, on_done: Callable[[Pulled], None]
    ) -> None:
        holder._reading.discard(handoff_id)
        on_done(pulled)
        if pulled.error is None:
            holder._on_pulled(handoff_id)

    def stop(self) -> None:
        """As KvTransfer.stop."""
        self._holders.pop(self._address, None)
