"""Whether the blocks that a worker computes turn up in its cache events.

An attempt that has given a token has its prompt's whole blocks in its engine's cache: the index should
have those that were not there before. A few of them are looked up when the request leaves the worker:
they are the last that it would evict. Where some are missing they are looked up once more after
SETTLE_STEPS of the engine, as events of vLLM come by another way than its tokens, a little later.

For a prompt of which nothing was named, it is also looked up whether its beginning was named as one block
of another size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from penstock.core.hashing import TOKEN_BYTES, packed_block_hash, token_bytes
from penstock.core.overlap_check import Announcement
from penstock.core.prefix_index import PrefixIndex

SAMPLES = 8
"""Blocks of a prompt that are looked up, the first and the last of the new ones among them."""

SETTLE_STEPS = 16
"""Steps of an engine after which its events of an answer have come: 0.2 s and more."""

MAX_UNSETTLED = 64
"""Answers of one worker that wait for that; further ones are not looked at."""

OTHER_SIZES = tuple(1 << power for power in range(11))
"""Tokens of a block that events may have in place of the right number."""

_ALL_NAMED = Announcement(1.0)


@dataclass(slots=True)
class _Unsettled:
    steps: int  # of the engine, when the answer left
    silent: bool  # no block was named from its sending until then
    sample: list[int]
    beginning: bytes  # of the prompt, packed: as many tokens as a block may have
    root: int


@dataclass(slots=True)
class _Worker:
    block_size: int
    named: int = 0  # blocks, by events, from the beginning on
    unsettled: deque[_Unsettled] = field(default_factory=deque)


class Announcements:
    """Keeps, for each worker, the answers whose blocks are still to be looked up. Unknown workers are
    ignored."""

    def __init__(self, index: PrefixIndex) -> None:
        self._index = index
        self._workers: dict[str, _Worker] = {}

    def add_worker(self, instance_id: str, block_size: int) -> None:
        """Begin with a worker, or begin anew."""
        self._workers[instance_id] = _Worker(block_size)

    def remove_worker(self, instance_id: str) -> None:
        self._workers.pop(instance_id, None)

    def named(self, instance_id: str, blocks: int = 0) -> int:
        """Its events say that so many more blocks are stored. Returns how many that are by now."""
        worker = self._workers.get(instance_id)
        if worker is None:
            return 0
        worker.named += blocks
        return worker.named

    def computed(
        self,
        instance_id: str,
        steps: int,
        named_before: int,
        new: Sequence[int],
        token_ids: Sequence[int],
        root: int,
    ) -> Iterator[Announcement]:
        """A prompt was computed there, and leaves. Gives what is known by now, of this answer or of earlier
        ones.

        Args:
            steps: of its engine, as last reported.
            named_before: how many blocks had been named when the attempt was sent.
            new: the hashes of the blocks that were not cached before.
            token_ids: the prompt.
            root: the seed of its first block.
        """
        worker = self._workers.get(instance_id)
        if worker is None or not new:
            return
        while worker.unsettled and worker.unsettled[0].steps + SETTLE_STEPS <= steps:
            yield self._look_up(instance_id, worker, worker.unsettled.popleft())
        sample = _sample(new)
        if all(self._index.holds(instance_id, each) for each in sample):
            yield _ALL_NAMED
        elif len(worker.unsettled) < MAX_UNSETTLED:
            silent, beginning = worker.named == named_before, token_bytes(token_ids[: OTHER_SIZES[-1]])
            worker.unsettled.append(_Unsettled(steps, silent, sample, beginning, root))

    def _look_up(self, instance_id: str, worker: _Worker, answer: _Unsettled) -> Announcement:
        found = sum(self._index.holds(instance_id, each) for each in answer.sample)
        if found:
            return Announcement(found / len(answer.sample))
        if answer.silent:
            return Announcement(0.0, silent=True)
        return Announcement(0.0, block_size=self._other_size(instance_id, worker, answer))

    def _other_size(self, instance_id: str, worker: _Worker, answer: _Unsettled) -> int | None:
        """The size of the block by which events name the beginning of the prompt, if they do."""
        for size in OTHER_SIZES:
            tokens = answer.beginning[: size * TOKEN_BYTES]
            if size == worker.block_size or len(tokens) < size * TOKEN_BYTES:
                continue
            if self._index.holds(instance_id, packed_block_hash(tokens, answer.root)):
                return size
        return None


def _sample(hashes: Sequence[int]) -> list[int]:
    """Some of them, evenly spaced, with the first and the last."""
    if len(hashes) <= SAMPLES:
        return list(hashes)
    return [hashes[place * (len(hashes) - 1) // (SAMPLES - 1)] for place in range(SAMPLES)]
