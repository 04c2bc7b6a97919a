"""The sim transfer with what can go wrong on its way, and with a look at whose blocks it touches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from penstock.engines.block_pool import BlockPool
from penstock.shapes import Handoff
from penstock.transfer.sim import SimNetwork, SimTransfer, SimTransferSettings
from simulator.journal import Journal
from simulator.loop import Process
from simulator.network import Network

GARBAGE = 0xEE
"""What a failed transfer leaves behind."""


class CheckedTransferNetwork(SimNetwork):
    """Transfers that meet the faults of the network and of the other process; each handoff is pulled once.

    Args:
        processes: gives the process of a worker; None where there is none.
    """

    def __init__(
        self, network: Network, processes: Callable[[str], Process | None], journal: Journal
    ) -> None:
        super().__init__()
        self.slower: dict[str, float] = {}  # factors by holder
        self._network = network
        self._processes = processes
        self._journal = journal
        self._offers: Counter[str] = Counter()  # handoffs that were offered and not yet pulled

    def pull_s(self, holder: str, reader: str, seconds: float) -> float:
        process = self._processes(holder)
        blocked = self._network.blocked(holder, reader) or self._network.blocked(reader, holder)
        if blocked or process is None or process.held:
            return float("inf")
        return seconds * self.slower.get(holder, 1.0)

    def offered(self, handoff_id: str) -> None:
        """A reader may read this handoff."""
        self._offers[handoff_id] += 1

    def pulled(self, handoff_id: str) -> None:
        """A reader has read it to its end."""
        self._journal.note("pulled", handoff_id)
        self._offers[handoff_id] -= 1
        if self._offers[handoff_id] < 0:
            self._journal.violate("handoffs are pulled once", f"{handoff_id} was pulled again")


class CheckedTransfer(SimTransfer):
    """Counts what is pulled; a pull that fails leaves garbage where its blocks should be.

    Args:
        wrong: called when blocks are read or written that have been freed.
    """

    def __init__(
        self,
        settings: SimTransferSettings,
        network: CheckedTransferNetwork,
        process: Process,
        wrong: Callable[[str], None],
    ) -> None:
        super().__init__(settings, network, process.name, process.clock)
        self.pool: Callable[[], BlockPool]  # of the engine that it is for
        self._checked = network
        self._wrong = wrong
        self._read: dict[str, Sequence[int]] = {}  # blocks that are being read from here

    def export(self, handoff_id: str, block_ids: Sequence[int]) -> tuple[str, bytes]:
        self._checked.offered(handoff_id)
        return super().export(handoff_id, block_ids)

    def _begin(self, handoff_id: str, reader: SimTransfer) -> Sequence[int] | None:
        offered = super()._begin(handoff_id, reader)
        if offered is not None:
            self._read[handoff_id] = offered
        return offered

    def _end(self, handoff_id: str) -> None:
        super()._end(handoff_id)
        self._held(self._read.pop(handoff_id, ()), f"freed while {handoff_id} is read from them")

    def _held(self, block_ids: Sequence[int], otherwise: str) -> None:
        free = [block for block in block_ids if not self.pool().references(block)]
        if free:
            self._wrong(f"blocks {free} are {otherwise}")

    async def _transfer(
        self, handoff: Handoff, sources: list[int], targets: list[int], timeout_s: float
    ) -> str | None:
        error = await super()._transfer(handoff, sources, targets, timeout_s)
        self._held(targets, f"freed while {handoff.handoff_id} is written to them")
        if error is None:
            self._checked.pulled(handoff.handoff_id)
        else:
            for target in targets:
                self._row(target)[:] = bytes([GARBAGE]) * len(self._row(target))
        return error
