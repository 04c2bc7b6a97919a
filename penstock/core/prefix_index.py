"""Which worker has which blocks: sequence hash -> the set of workers, as the bits of one int.

A worker owns a *slot*, a bit position. `overlaps` walks a prompt's hashes once and keeps the set of
workers that still have every block so far, so its cost does not grow with the number of workers.

Forgetting a worker is O(1), whatever it had: its slot is *retired*, which takes its bit out of `_live`,
and the bits that it left behind are swept later, a bounded number of blocks with each event. Only a slot
that has been swept is given out again.

Blocks lie in shards, by the low bits of their hash: no dict is ever so large that its growth would stall
the event loop. Blocks with equal sets of workers share one int for the set: among a thousand workers each
such int takes 160 bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_SHARDS = 1024
"""At 10M blocks a shard has 10,000, and its dict grows in less than a millisecond."""

_SHARD_MASK = _SHARDS - 1

SWEEP_BLOCKS = 1024
"""Blocks looked at by one sweep: a few tenths of a millisecond."""

MAX_SHARED = 4096
"""Sets of workers that are found again when other blocks get the same one; beyond that, anew."""


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
        self._bits: dict[str, int] = {}  # 1 << slot, one object for all blocks that only this worker has
        self._owners: list[str | None] = []  # by slot; None: free, retired or being swept
        self._free: list[int] = []
        self._live = 0  # the bits of slots that have an owner
        self._held: dict[str, int] = {}
        self._sets: dict[int, int] = {}  # sets of workers, each by itself
        self._retired = 0  # bits to sweep in the next round
        self._sweeping = 0  # bits being swept in this round
        self._next_shard = 0  # where this round goes on
        self._next_keys: list[int] = []  # of the shard before that: those still to be looked at

    def __len__(self) -> int:
        """Distinct blocks, those not swept yet included."""
        return sum(map(len, self._shards))

    @property
    def workers(self) -> list[str]:
        return list(self._slots)

    def held(self, worker: str) -> int:
        """How many blocks this worker has."""
        return self._held[worker]

    def holds(self, worker: str, key: int) -> bool:
        """Whether this worker has this block."""
        return bool(self._shards[key & _SHARD_MASK].get(key, 0) >> self._slots[worker] & 1)

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
                for slot in _bit_numbers(holders & live):
                    found[slot] ^= key
        return {worker: found[slot] for worker, slot in self._slots.items()}

    def add_worker(self, worker: str) -> None:
        """Begin with a worker, with no blocks. One that is here already is left as it is."""
        if worker not in self._slots:
            self._occupy(worker)

    def remove_worker(self, worker: str) -> None:
        """Forget a worker and everything it had. Unknown workers are ignored."""
        if worker in self._slots:
            self._vacate(worker)
            if self._sweeping or self._retired:
                self.sweep()

    def cleared(self, worker: str) -> None:
        """The worker has nothing cached, whatever was known of it."""
        self._vacate(worker)
        if self._sweeping or self._retired:
            self.sweep()
        self._occupy(worker)

    def stored(self, worker: str, hashes: Iterable[int]) -> None:
        """The worker now has these blocks. Those it had already are ignored."""
        bit, shards = self._bits[worker], self._shards
        added = 0
        before = after = 0
        for key in hashes:
            shard = shards[key & _SHARD_MASK]
            holders = shard.get(key)
            if holders is None:
                shard[key] = bit
                added += 1
                continue
            if holders is not before:  # else as the block before it
                before, after = holders, holders if holders & bit else self._shared(holders | bit)
            if after is not holders:
                shard[key] = after
                added += 1
        self._held[worker] += added
        if self._sweeping or self._retired:
            self.sweep()

    def removed(self, worker: str, hashes: Iterable[int]) -> int:
        """The worker evicted these blocks. Returns how many of them it had; the others change nothing."""
        bit, shards = self._bits[worker], self._shards
        gone = 0
        before = after = 0
        for key in hashes:
            shard = shards[key & _SHARD_MASK]
            holders = shard.get(key, 0)
            if holders is not before:
                before, after = holders, self._shared(holders ^ bit) if holders & bit else holders
            if after is not holders:
                gone += 1
                if after:
                    shard[key] = after
                else:
                    del shard[key]
        self._held[worker] -= gone
        if self._sweeping or self._retired:
            self.sweep()
        return gone

    def overlaps(self, hashes: Sequence[int]) -> dict[str, int]:
        """For each worker that has block 0: the largest n such that it has all of hashes[:n]."""
        found: dict[str, int] = {}
        shards, owners, holders, before = self._shards, self._owners, self._live, None
        for depth, key in enumerate(hashes):
            have = shards[key & _SHARD_MASK].get(key, 0)
            if have is before:  # as most blocks of one prefix: `holders` are among them already
                continue
            before, still = have, have & holders
            if still != holders:
                if depth:
                    _note(holders ^ still, depth, owners, found)
                if not still:
                    return found
                holders = still
        if hashes:
            _note(holders, len(hashes), owners, found)
        return found

    def sweep(self) -> bool:
        """Clean up a bounded part of what removed workers left behind; whether more is left. Every event
        does this too; an idle caller may, to get memory back."""
        if not self._sweeping:
            self._sweeping, self._retired = self._retired, 0
            self._next_shard = 0
        left = self._sweep_blocks
        while self._sweeping and left > 0:
            if self._next_keys:
                keys = self._next_keys[-left:]
                del self._next_keys[-left:]
                self._drop(self._shards[self._next_shard - 1], keys)
                left -= len(keys)
            elif self._next_shard < _SHARDS:
                self._next_keys = list(self._shards[self._next_shard])
                self._next_shard += 1
                left -= 1
            else:
                self._free += _bit_numbers(self._sweeping)
                self._sweeping = 0
        return bool(self._sweeping or self._retired)

    def _drop(self, shard: dict[int, int], keys: Sequence[int]) -> None:
        """Clear the bits being swept in these entries; entries without any bit left go."""
        bits = self._sweeping
        for key in keys:
            holders = shard.get(key, 0)  # 0: gone meanwhile
            if holders & bits:
                rest = holders & ~bits
                if rest:
                    shard[key] = self._shared(rest)
                else:
                    del shard[key]

    def _shared(self, holders: int) -> int:
        """The same set, as one object."""
        if len(self._sets) >= MAX_SHARED:
            self._sets.clear()
        return self._sets.setdefault(holders, holders)

    def _occupy(self, worker: str) -> None:
        if self._free:
            slot = self._free.pop()
        else:
            slot = len(self._owners)
            self._owners.append(None)
        self._owners[slot] = worker
        self._slots[worker] = slot
        self._bits[worker] = 1 << slot
        self._held[worker] = 0
        self._live |= 1 << slot

    def _vacate(self, worker: str) -> None:
        slot = self._slots.pop(worker)
        del self._bits[worker]
        self._owners[slot] = None
        self._live ^= 1 << slot
        if self._held.pop(worker):
            self._retired |= 1 << slot
        else:
            self._free.append(slot)  # it left no bits behind


def _note(bits: int, depth: int, owners: Sequence[str | None], found: dict[str, int]) -> None:
    """The owners of these slots have so many blocks, and no more. Mostly it is one slot, but of a prefix
    that hundreds of workers have, each may have another length."""
    while bits:
        slot = bits.bit_length() - 1
        owner = owners[slot]
        assert owner is not None  # `bits` come from `_live`
        found[owner] = depth
        bits ^= 1 << slot


def _bit_numbers(bits: int) -> list[int]:
    """The positions of the set bits, lowest first."""
    numbers = []
    while bits:
        low = bits & -bits
        numbers.append(low.bit_length() - 1)
        bits ^= low
    return numbers
