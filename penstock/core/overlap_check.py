"""Whether the index tells the truth about an instance: predicted against reported cached tokens.

Each answer of an engine says how many prompt tokens it found cached; the router had predicted a number.
Single differences are normal: blocks are evicted or stored in between, and an engine computes the last
block again when all of a prompt is cached. A lasting difference is a fault with a name:

    cause              what is seen                                  usual reason
    -----------------  --------------------------------------------  -----------------------------------
    events_off         hits, while its index is empty                KV events disabled or not arriving
    hash_mismatch      hits, none foreseen, its index is not empty   another block size, template or salt
    under_prediction   more hits than foreseen                       some events lost
    over_prediction    fewer hits than foreseen                      removals lost, cache reset unnoticed

An instance is distrusted when the wrong share of its cached tokens passes DISTRUST_SHARE, and trusted
again below TRUST_SHARE. Both are over decaying sums, so one burst does not decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import msgspec

DISTRUST_SHARE = 0.5
"""Half of the cached tokens wrong: routing by the index then is no better than by load alone."""

TRUST_SHARE = 0.2
"""Low enough not to flap: recovery needs a clear majority of right predictions."""

MIN_OBSERVATIONS = 16
"""Answers with any cached or predicted tokens before a verdict."""

DECAY = 1 - 1 / 32
"""Weight of an observation relative to the next: about 32 of them decide."""


class Cause(StrEnum):
    EVENTS_OFF = "events_off"
    HASH_MISMATCH = "hash_mismatch"
    UNDER_PREDICTION = "under_prediction"
    OVER_PREDICTION = "over_prediction"


class Verdict(msgspec.Struct, frozen=True):
    """A change of trust. `cause` is None when the instance is trusted again."""

    cause: Cause | None
    predicted_tokens: float  # decaying sums, for the log
    cached_tokens: float

    def __str__(self) -> str:
        state = f"distrusted, {self.cause}" if self.cause is not None else "trusted again"
        return (
            f"{state} (recently about {self.predicted_tokens:.0f} cached tokens foreseen, "
            f"{self.cached_tokens:.0f} found)"
        )


@dataclass(slots=True)
class _Record:
    observations: int = 0
    predicted: float = 0.0  # decaying sums of tokens
    cached: float = 0.0
    over: float = 0.0  # foreseen and not found, beyond a block
    under: float = 0.0  # found and not foreseen, beyond a block
    cause: Cause | None = None

    @property
    def wrong_share(self) -> float:
        return max(self.over, self.under) / max(self.predicted, self.cached)


class OverlapCheck:
    """The trust in each instance's part of the index. Instances appear with their first observation."""

    def __init__(self) -> None:
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
        """Take one answer; returns the change of trust that it causes, if any.

        Args:
            predicted_cached_tokens: by the index, also while the instance is distrusted: that is how
                it can be trusted again.
            actual_cached_tokens: as the engine reported.
            block_size: the tolerance, in tokens.
            held_blocks: how many blocks the index has of the instance now; None when unknown.
        """
        if not predicted_cached_tokens and not actual_cached_tokens:
            return None
        record = self._records.setdefault(instance_id, _Record())
        difference = predicted_cached_tokens - actual_cached_tokens
        record.observations += 1
        record.predicted = record.predicted * DECAY + predicted_cached_tokens
        record.cached = record.cached * DECAY + actual_cached_tokens
        record.over = record.over * DECAY + (difference if difference > block_size else 0)
        record.under = record.under * DECAY + (-difference if -difference > block_size else 0)
        return self._judge(record, held_blocks)

    def trusted(self, instance_id: str) -> bool:
        """Whether to route by what the index says of this instance."""
        return self.cause(instance_id) is None

    def cause(self, instance_id: str) -> Cause | None:
        """Why the instance is distrusted; None when it is not."""
        record = self._records.get(instance_id)
        return record.cause if record is not None else None

    def forget(self, instance_id: str) -> None:
        """The instance is gone; another incarnation starts trusted."""
        self._records.pop(instance_id, None)

    def _judge(self, record: _Record, held_blocks: int | None) -> Verdict | None:
        if record.observations < MIN_OBSERVATIONS:
            return None
        before = record.cause
        if before is None and record.wrong_share > DISTRUST_SHARE:
            record.cause = _name(record, held_blocks)
        elif before is not None and record.wrong_share < TRUST_SHARE:
            record.cause = None
        if record.cause is before:
            return None
        return Verdict(record.cause, record.predicted, record.cached)


def _name(record: _Record, held_blocks: int | None) -> Cause:
    if record.over > record.under:
        return Cause.OVER_PREDICTION
    if held_blocks == 0:
        return Cause.EVENTS_OFF
    if record.predicted < 1.0:
        return Cause.HASH_MISMATCH if held_blocks else Cause.EVENTS_OFF
    return Cause.UNDER_PREDICTION
