"""What a worker has cached by all appearances: for workers whose cache events are missing or wrong.

A model of the worker's cache, fed with what this frontend knows by itself: which prompts and answers
were computed there, and how much of each prompt the engine found cached. A block counts as cached for its
*lifetime* after its latest use. That is not a time but a number of blocks computed there since: an engine
evicts a block when others need room, however much time passes. At first it is the worker's whole pool.
Requests of other frontends, which are not seen here, make it shorter, so it is learned: each answer
shows whether blocks of some age were still there, and the lifetime is the one with which the fewest blocks
of the latest answers would have been foreseen wrongly.

A worker has no more blocks here than its pool has. Whoever uses a block uses all before it, so a prefix's
blocks are ever the less recently used the further back they are, and a lookup is a binary search.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Sequence

FORGETTING = 1 - 1 / 32
"""Weight of an answer relative to the next one: about 32 of them decide about the lifetime."""

SAMPLES = 16
"""Blocks of a prompt whose ages are learned from."""

_AGES = tuple(int(16 * 1.25**power) for power in range(62))
"""Bounds of ages that are told apart, in blocks: from 16 to 16 million."""


class _Cache:
    """Of one worker."""

    def __init__(self, total_blocks: int) -> None:
        self._total_blocks = total_blocks
        self._lifetime = total_blocks
        self._computed = 0  # blocks, from the beginning on
        # `_computed` at the latest use of each block; least recently used first.
        self._used: OrderedDict[int, int] = OrderedDict()
        self._found = [0.0] * (len(_AGES) + 1)  # by age, decaying numbers of blocks that were there
        self._missed = [0.0] * (len(_AGES) + 1)

    def __len__(self) -> int:
        return len(self._used)

    @property
    def lifetime(self) -> int:
        return self._lifetime

    def overlap(self, hashes: Sequence[int]) -> int:
        oldest = self._computed - self._lifetime
        return _prefix(hashes, lambda each: self._used.get(each, oldest - 1) >= oldest)

    def found(self, hashes: Sequence[int], blocks: int) -> None:
        known = _prefix(hashes, lambda each: each in self._used)
        if not known:
            return
        self._found = [FORGETTING * each for each in self._found]
        self._missed = [FORGETTING * each for each in self._missed]
        samples = min(SAMPLES, known)
        for number in range(samples):
            place = number * known // samples
            age = bisect_left(_AGES, self._computed - self._used[hashes[place]])
            (self._found if place < blocks else self._missed)[age] += 1.0
        self._lifetime = self._best_lifetime()

    def used(self, hashes: Sequence[int], computed: int | None) -> None:
        used = self._used
        self._computed += sum(each not in used for each in hashes) if computed is None else computed
        for each in reversed(hashes):  # the last one is to go first
            used[each] = self._computed
            used.move_to_end(each)
        while len(used) > self._total_blocks:
            used.popitem(last=False)

    def _best_lifetime(self) -> int:
        """The age up to which most more blocks were found than missed; of several, the highest."""
        more, most, best = 0.0, 0.0, 0
        for bound, found, missed in zip(_AGES, self._found, self._missed, strict=False):
            more += found - missed
            if more >= most:
                most, best = more, bound
        return min(best, self._total_blocks)


class ApproximateIndex:
    """The workers that were added, each with its pool."""

    def __init__(self) -> None:
        self._caches: dict[str, _Cache] = {}

    def __contains__(self, worker: str) -> bool:
        return worker in self._caches

    def add_worker(self, worker: str, total_blocks: int) -> None:
        """Begin with a worker of which nothing is known; one that is here already is left as it is."""
        if worker not in self._caches:
            self._caches[worker] = _Cache(total_blocks)

    def remove_worker(self, worker: str) -> None:
        """Forget a worker. Unknown ones are ignored."""
        self._caches.pop(worker, None)

    def held(self, worker: str) -> int:
        """How many blocks are remembered of it, those beyond their lifetime included."""
        return len(self._caches[worker])

    def lifetime(self, worker: str) -> int:
        """How many blocks are computed there until one that is not used is gone, as far as is known."""
        return self._caches[worker].lifetime

    def overlap(self, worker: str, hashes: Sequence[int]) -> int:
        """How many of a prompt's first blocks it has by all appearances."""
        return self._caches[worker].overlap(hashes)

    def found(self, worker: str, hashes: Sequence[int], blocks: int) -> None:
        """Its engine found so many blocks of a prompt cached. `hashes`: of the blocks that it could have
        found. `used` should follow."""
        self._caches[worker].found(hashes, blocks)

    def used(self, worker: str, hashes: Sequence[int], computed: int | None = None) -> None:
        """It has these blocks now, all from the first one on. `computed`: so many of them were not cached
        before; None: those that were not known here."""
        self._caches[worker].used(hashes, computed)


def _prefix(hashes: Sequence[int], known: Callable[[int], bool]) -> int:
    """How many of the first are known, where whatever precedes a known one is known."""
    return bisect_left(hashes, True, key=lambda each: not known(each))
