"""Which worker has which blocks: sequence hash -> the set of workers, as the bits of one int.

A worker owns a *slot*, a bit position. `overlaps` walks a prompt's hashes once and keeps the set of
workers that still have every block so far, so its cost does not grow with the number of workers.

Forgetting a worker is O(1), whatever it had: its slot is *retired*, which takes its bit out of `_live`,
and the bits that it left behind are swept later, a bounded number of blocks with each event. Only a slot
that has been swept is given out again. Blocks lie in shards, by the low bits of their hash, for the same
reason: a sweep never iterates a dict that an event changes meanwhile, and no dict is ever so large that
its growth would stall the event loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_SHARDS = 256
"""At 1M blocks a shard has 4,000: swept, or grown, in well under a millisecond."""

_SHARD_MASK = _SHARDS - 1

SWEEP_BLOCKS = 4096
"""Blocks looked at by one sweep, to the end of a shard: about half a millisecond."""


def most_blocks(total_blocks: int) -> int:
    """How many blocks a worker with a pool of `total_blocks` may claim to have cached.

    No engine here has more than its pool. Twice that, and a thousand for the smallest pools, is room for
    one that keeps some elsewhere, and bounds what a worker that loses or invents events costs a frontend.
    """
    return 2 * total_blocks + 1000


class PrefixIndex:
    """The blocks of all workers, as far as their events tell.

    `worker` arguments are instance ids. Methods other than `add_worker` and `remove_worker` raise
    KeyError for a worker that was not added.
    """

    def __init__(self, *, sweep_blocks: int = SWEEP_BLOCKS) -> None:
        self._sweep_blocks = sweep_blocks
        self._shards: list[dict[int, int]] = [{} for _ in range(_SHARDS)]
        self._slots: dict[str, int] = {}
        self._owners: list[str | None] = []  # by slot; None: free, retired or being swept
        self._free: list[int] = []
        self._live = 0  # the bits of slots that have an owner
        self._held: dict[str, int] = {}
        self._retired = 0  # bits to sweep in the next round
        self._sweeping = 0  # bits being swept in this round
        self._next_shard = 0  # where this round goes on

    def __len__(self) -> int:
        """Distinct blocks, those not swept yet included."""
        return sum(map(len, self._shards))

    @property
    def workers(self) -> list[str]:
        return list(self._slots)

    def held(self, worker: str) -> int:
        """How many blocks this worker has."""
        return self._held[worker]

    def blocks(self) -> dict[str, set[int]]:
        """All blocks of each worker. Costs a look at every entry; for tests."""
        found: dict[str, set[int]] = {worker: set() for worker in self._slots}
        for shard in self._shards:
            for key, holders in shard.items():
                for slot in _bit_numbers(holders & self._live):
                    owner = self._owners[slot]
                    assert owner is not None  # it is live
                    found[owner].add(key)
        return found

    def digests(self) -> dict[str, int]:
        """The exclusive or of the blocks of each worker: equal where the blocks are equal. Costs a look at
        every entry; for tests."""
        found = dict.fromkeys(self._slots.values(), 0)
        live = self._live
        for shard in self._shards:
            for key, holders in shard.items():
                holders &= live
                while holders:
                    low = holders & -holders
                    found[low.bit_length() - 1] ^= key
                    holders ^= low
        return {worker: found[slot] for worker, slot in self._slots.items()}

    def add_worker(self, worker: str) -> None:
        """Begin with a worker, with no blocks. One that is here already is left as it is."""
        if worker not in self._slots:
            self._occupy(worker)

    def remove_worker(self, worker: str) -> None:
        """Forget a worker and everything it had. Unknown workers are ignored."""
        if worker in self._slots:
            self._vacate(worker)
            self._sweep_if_needed()

    def cleared(self, worker: str) -> None:
        """The worker has nothing cached, whatever was known of it."""
        self._vacate(worker)
        self._sweep_if_needed()
        self._occupy(worker)

    def stored(self, worker: str, hashes: Iterable[int]) -> None:
        """The worker now has these blocks. Those it had already are ignored."""
        bit = 1 << self._slots[worker]
        shards = self._shards
        added = 0
        for key in hashes:
            shard = shards[key & _SHARD_MASK]
            holders = shard.get(key)
            if holders is None:
                shard[key] = bit  # one int object for all blocks that only this worker has
                added += 1
            elif not holders & bit:
                shard[key] = holders | bit
                added += 1
        self._held[worker] += added
        self._sweep_if_needed()

    def removed(self, worker: str, hashes: Iterable[int]) -> int:
        """The worker evicted these blocks. Returns how many of them it had; the others change nothing."""
        bit = 1 << self._slots[worker]
        shards = self._shards
        gone = 0
        for key in hashes:
            shard = shards[key & _SHARD_MASK]
            holders = shard.get(key, 0)
            if holders & bit:
                gone += 1
                if holders == bit:
                    del shard[key]
                else:
                    shard[key] = holders ^ bit
        self._held[worker] -= gone
        self._sweep_if_needed()
        return gone

    def overlaps(self, hashes: Sequence[int]) -> dict[str, int]:
        """For each worker that has block 0: the largest n such that it has all of hashes[:n]."""
        found: dict[str, int] = {}
        shards = self._shards
        holders = self._live
        for depth, key in enumerate(hashes):
            still = shards[key & _SHARD_MASK].get(key, 0) & holders
            if still != holders:
                if depth:
                    self._note(holders ^ still, depth, found)
                if not still:
                    return found
                holders = still
        if hashes:
            self._note(holders, len(hashes), found)
        return found

    def sweep(self) -> bool:
        """Clean up a bounded part of what removed workers left behind; whether more is left. Every event
        does this too; an idle caller may, to get memory back."""
        if not self._sweeping:
            self._sweeping, self._retired = self._retired, 0
            self._next_shard = 0
        looked_at = 0
        while self._sweeping and looked_at < self._sweep_blocks:
            if self._next_shard == _SHARDS:
                self._free += _bit_numbers(self._sweeping)
                self._sweeping = 0
                break
            shard = self._shards[self._next_shard]
            looked_at += len(shard)
            _drop(shard, self._sweeping)
            self._next_shard += 1
        return bool(self._sweeping or self._retired)

    def _sweep_if_needed(self) -> None:
        if self._sweeping or self._retired:
            self.sweep()

    def _occupy(self, worker: str) -> None:
        if self._free:
            slot = self._free.pop()
        else:
            slot = len(self._owners)
            self._owners.append(None)
        self._owners[slot] = worker
        self._slots[worker] = slot
        self._held[worker] = 0
        self._live |= 1 << slot

    def _vacate(self, worker: str) -> None:
        slot = self._slots.pop(worker)
        self._owners[slot] = None
        self._live ^= 1 << slot
        if self._held.pop(worker):
            self._retired |= 1 << slot
        else:
            self._free.append(slot)  # it left no bits behind

    def _note(self, bits: int, depth: int, found: dict[str, int]) -> None:
        for slot in _bit_numbers(bits):
            owner = self._owners[slot]
            assert owner is not None  # `bits` come from `_live`
            found[owner] = depth


def _bit_numbers(bits: int) -> list[int]:
    """The positions of the set bits, lowest first."""
    numbers = []
    while bits:
        low = bits & -bits
        numbers.append(low.bit_length() - 1)
        bits ^= low
    return numbers


def _drop(shard: dict[int, int], bits: int) -> None:
    """Clear `bits` in every entry; entries without any bit left go."""
    for key in [key for key, holders in shard.items() if holders & bits]:
        rest = shard[key] & ~bits
        if rest:
            shard[key] = rest
        else:
            del shard[key]
