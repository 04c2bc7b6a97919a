"""Whether what a worker's cache events say is true, and what is wrong with them where it is not.

Two kinds of evidence, both from answers of its engine:

    hits           how many prompt tokens the engine found cached, against what the index had foreseen
    announcements  of blocks that the engine has just computed for a prompt, how many its events named
                   (core/announcements.py)

Single differences are normal: blocks are evicted or stored in between, and an engine computes the last
block again when all of a prompt is cached. A lasting difference is a fault with a name:

    cause             what is seen                                  usual reason
    ----------------  --------------------------------------------  ------------------------------------
    no_events         the worker says so itself                     an engine without events
    events_off        no events come, or hits with an empty index   events disabled, or not arriving
    block_size        its events name the prompts' blocks, but of   card and engine differ
                      another size
    hash_mismatch     events come, and name none of the prompts'    another chat template, tokenizer, model
                      blocks                                        name or cache salt inside the engine
    events_lost       they name some, and not the others            some stored events are lost
    unseen_evictions  fewer hits than foreseen, or more blocks      removals lost, cache reset unnoticed
                      cached than there can be

An instance is distrusted when the wrong share of its evidence passes DISTRUST_SHARE, and trusted again
below TRUST_SHARE, so one burst does not decide. Where announcements tell how the events are, hits that were
not foreseen say nothing more: such blocks were stored before this frontend could hear of it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec

DISTRUST_SHARE = 0.5
"""Half of what was foreseen wrong: routing by the index then is no better than by load alone."""

TRUST_SHARE = 0.2
"""Low enough not to flap: recovery needs a clear majority of right predictions."""

MIN_OBSERVATIONS = 16
"""Answers with any cached or predicted tokens before a verdict from hits."""

DECAY = 1 - 1 / 32
"""Weight of an observation of hits relative to the next: about 32 of them decide."""

ANNOUNCEMENTS = 16
"""The latest answers whose announcements count. Nine without any are a verdict, 13 with all take it
back."""

MIN_ANNOUNCEMENTS = 8
"""Answers before announcements tell anything. The cause is named from as many, the latest ones: those
before may be of a time when all was well."""


class Cause(StrEnum):
    NO_EVENTS = "no_events"
    EVENTS_OFF = "events_off"
    BLOCK_SIZE = "block_size"
    HASH_MISMATCH = "hash_mismatch"
    EVENTS_LOST = "events_lost"
    UNSEEN_EVICTIONS = "unseen_evictions"


CAUSE_WORDS = {
    Cause.NO_EVENTS: "it tells nothing of its cache",
    Cause.EVENTS_OFF: "no cache events come from it",
    Cause.BLOCK_SIZE: "its cache events are of blocks of another size than it said",
    Cause.HASH_MISMATCH: "its cache events name blocks that the prompts sent to it do not have",
    Cause.EVENTS_LOST: "some of its cache events are lost",
    Cause.UNSEEN_EVICTIONS: "it evicts blocks without saying so",
}
"""For people."""


class Announcement(msgspec.Struct, frozen=True):
    """What events said of the blocks in which one answer's prompt was computed. `share`: of those looked
    at, named. `silent`: none, and no other block either while its attempt was there. `block_size`: the size
    that events have in place of the right one; None when that is not seen."""

    share: float
    silent: bool = False
    block_size: int | None = None


class Verdict(msgspec.Struct, frozen=True):
    """A change of trust, or of its reason. `cause` is None when the instance is trusted again."""

    cause: Cause | None
    predicted_tokens: float  # decaying sums, for the log
    cached_tokens: float
    announced_share: float | None = None  # of the blocks that were computed lately; None: not known
    block_size: int | None = None  # with BLOCK_SIZE

    def __str__(self) -> str:
        facts = (
            f"cached tokens lately: {self.predicted_tokens:.0f} foreseen, {self.cached_tokens:.0f} found"
        )
        if self.announced_share is not None:
            facts += f"; of the blocks that it computed, its events named {self.announced_share:.0%}"
        if self.cause is None:
            return f"trusted again: routing by its cache events ({facts})"
        size = f": {self.block_size} tokens" if self.block_size is not None else ""
        return (
            f"distrusted, {self.cause}: {CAUSE_WORDS[self.cause]}{size}; routing by what was sent to it "
            f"instead ({facts})"
        )


@dataclass(slots=True)
class _Record:
    observations: int = 0
    predicted: float = 0.0  # decaying sums of tokens
    cached: float = 0.0
    over: float = 0.0  # foreseen and not found, beyond a block
    under: float = 0.0  # found and not foreseen, beyond a block
    announcements: deque[Announcement] = field(default_factory=lambda: deque(maxlen=ANNOUNCEMENTS))
    shares: deque[float] = field(default_factory=lambda: deque(maxlen=ANNOUNCEMENTS))  # of these
    held_blocks: int | None = None  # in the index, as of the latest hit

    @property
    def unannounced(self) -> float | None:
        """The share of blocks that events did not name; None: too few answers to tell."""
        if len(self.shares) < MIN_ANNOUNCEMENTS:
            return None
        return 1.0 - sum(self.shares) / len(self.shares)

    @property
    def latest(self) -> list[Announcement]:
        """Those that a cause is named from."""
        return list(self.announcements)[-MIN_ANNOUNCEMENTS:]

    @property
    def all_missed(self) -> bool:
        """Whether events have named nothing lately."""
        return len(self.announcements) >= MIN_ANNOUNCEMENTS and not any(it.share for it in self.latest)

    def forget_hits(self) -> None:
        """Begin anew with evidence from hits."""
        self.observations = 0
        self.predicted = self.cached = self.over = self.under = 0.0

    def wrong(self, limit: float, unannounced: float | None) -> bool:
        """Whether more than this share of either evidence is wrong. `unannounced` as above."""
        tokens = max(self.predicted, self.cached)
        if unannounced is not None and unannounced > limit:
            return True
        if not tokens or self.observations < MIN_OBSERVATIONS:
            return False
        # Events that come as they should make up for hits that could not be foreseen.
        return (self.over if unannounced is not None else max(self.over, self.under)) / tokens > limit

    def named(self) -> Cause:
        """The cause, where something is wrong."""
        unannounced = self.unannounced
        if unannounced is not None and unannounced > TRUST_SHARE:
            missed = [it for it in self.latest if it.share < 1.0]
            if 2 * sum(it.silent for it in missed) > len(missed):
                return Cause.EVENTS_OFF
            if 2 * sum(it.block_size is not None for it in missed) > len(missed):
                return Cause.BLOCK_SIZE
            return Cause.EVENTS_LOST if any(it.share for it in self.latest) else Cause.HASH_MISMATCH
        if unannounced is not None or self.over > self.under:
            return Cause.UNSEEN_EVICTIONS
        if not self.held_blocks:
            return Cause.EVENTS_OFF
        return Cause.HASH_MISMATCH if self.predicted < 1.0 else Cause.EVENTS_LOST


class OverlapCheck:
    """The trust in each instance's part of the index. Instances appear with their first observation."""

    def __init__(self) -> None:
        self.causes: dict[str, Cause] = {}  # of those that are distrusted
        self._records: dict[str, _Record] = {}

    def observe(
        self,
        instance_id: str,
        predicted_cached_tokens: int,
        actual_cached_tokens: int,
        block_size: int,
        *,
        held_blocks: int | None = None,
    ) -> Verdict | None:
        """Take the hits of one answer; returns the change of trust that they cause, if any.

        Args:
            predicted_cached_tokens: by the index, also while the instance is distrusted: that is how
                it can be trusted again.
            actual_cached_tokens: as the engine reported.
            block_size: the tolerance, in tokens.
            held_blocks: how many blocks the index has of the instance now; None when unknown.
        """
        if not predicted_cached_tokens and not actual_cached_tokens:
            return None
        record = self._record(instance_id)
        difference = predicted_cached_tokens - actual_cached_tokens
        record.observations += 1
        record.predicted = record.predicted * DECAY + predicted_cached_tokens
        record.cached = record.cached * DECAY + actual_cached_tokens
        record.over = record.over * DECAY + (difference if difference > block_size else 0)
        record.under = record.under * DECAY + (-difference if -difference > block_size else 0)
        record.held_blocks = held_blocks
        return self._judge(instance_id, record)

    def announced(self, instance_id: str, announcement: Announcement) -> Verdict | None:
        """Take what events said of one answer's blocks; returns the change of trust, if any."""
        record = self._record(instance_id)
        record.announcements.append(announcement)
        record.shares.append(announcement.share)
        return self._judge(instance_id, record)

    def tells_nothing(self, instance_id: str) -> None:
        """The worker says that no events will come from it."""
        self.causes[instance_id] = Cause.NO_EVENTS

    def overflowed(self, instance_id: str) -> Verdict | None:
        """Its events say that it has more blocks cached than it can have; returns the change of trust, if
        any. The index begins anew with it."""
        record = self._records.pop(instance_id, _Record())
        before, self.causes[instance_id] = self.causes.get(instance_id), Cause.UNSEEN_EVICTIONS
        if before is Cause.UNSEEN_EVICTIONS:
            return None
        return Verdict(Cause.UNSEEN_EVICTIONS, record.predicted, record.cached)

    def healthy(self, instance_id: str) -> bool:
        """Whether its events are known to name what it computes."""
        record = self._records.get(instance_id)
        unannounced = record.unannounced if record is not None else None
        return unannounced is not None and unannounced < TRUST_SHARE

    def trusted(self, instance_id: str) -> bool:
        """Whether to route by what the index says of this instance."""
        return instance_id not in self.causes

    def cause(self, instance_id: str) -> Cause | None:
        """Why the instance is distrusted; None when it is not."""
        return self.causes.get(instance_id)

    def forget(self, instance_id: str) -> None:
        """The instance is gone; another incarnation starts trusted."""
        self._records.pop(instance_id, None)
        self.causes.pop(instance_id, None)

    def _record(self, instance_id: str) -> _Record:
        record = self._records.get(instance_id)
        if record is None:
            record = self._records[instance_id] = _Record()
        return record

    def _judge(self, instance_id: str, record: _Record) -> Verdict | None:
        before, unannounced = self.causes.get(instance_id), record.unannounced
        predicted, cached = record.predicted, record.cached
        cause = before
        if before is None:
            if not record.wrong(DISTRUST_SHARE, unannounced):
                return None
            cause = record.named()
        elif before is Cause.NO_EVENTS:
            return None
        elif before is not Cause.UNSEEN_EVICTIONS and unannounced is not None and unannounced < TRUST_SHARE:
            cause = None
            record.forget_hits()  # those of the time without events say nothing of what follows
        elif record.observations >= MIN_OBSERVATIONS and not record.wrong(TRUST_SHARE, unannounced):
            cause = None
        elif record.all_missed:
            cause = record.named()  # more is known than when it was named first
        if cause is before:
            return None
        if cause is None:
            del self.causes[instance_id]
        else:
            self.causes[instance_id] = cause
        return Verdict(
            cause,
            predicted,
            cached,
            1.0 - unannounced if unannounced is not None else None,
            record.announcements[-1].block_size if cause is Cause.BLOCK_SIZE else None,
        )
