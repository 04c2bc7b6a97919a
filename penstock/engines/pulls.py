"""KV on its way here: which handoffs may be pulled, and whose blocks a transfer may still be writing.

A pull's blocks belong to the pull until the transfer has said that it ended, whatever has become of the
attempt meanwhile; only then can they be used for something else. So an attempt that is cancelled, or that
has waited too long, leaves its pull behind with the blocks.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from penstock.core.prompt_work import PromptWork, prompt_work
from penstock.engines.active import ActiveAttempt, AttemptPhase, mismatch
from penstock.engines.block_pool import BlockPool
from penstock.engines.effects import Pull
from penstock.ports import Pulled
from penstock.shapes import Attempt, EngineCard, Handoff

log = logging.getLogger("penstock.engine")

PULL_GRACE_S = 1.0
"""How long after its timeout a pull may still report before its attempt stops waiting for it."""

USED_HANDOFFS = 4096
"""Handoff ids remembered as used. The holder refuses a second pull anyway; this saves the round trip."""


@dataclass(slots=True)
class _OpenPull:
    active: ActiveAttempt | None  # None: its attempt did not wait
    handoff: Handoff
    block_ids: list[int]  # all of the attempt's: its cached prefix, and those being written
    deadline: float


class OpenPulls:
    """All pulls that have not ended. Times are seconds of one clock.

    Args:
        card: this engine, which a handoff must match.
        pool: where the blocks of an abandoned or failed pull go.
        timeout_s: how long a pull may take.
    """

    def __init__(self, card: EngineCard, pool: BlockPool, timeout_s: float) -> None:
        self._card = card
        self._pool = pool
        self._timeout_s = timeout_s
        self._open: dict[str, _OpenPull] = {}  # by attempt id
        self._used: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, attempt_id: str) -> bool:
        return attempt_id in self._open

    @property
    def next_deadline(self) -> float | None:
        """When `late` has something to do; None when nobody waits for a pull."""
        waited_for = (pull.deadline for pull in self._open.values() if pull.active is not None)
        return min(waited_for, default=None)

    def block_ids(self) -> Iterator[list[int]]:
        """The blocks that each pull holds."""
        return (pull.block_ids for pull in self._open.values())

    def accept(self, active: ActiveAttempt, attempt: Attempt, now: float) -> Pull | None:
        """Keep the attempt's handoff for its turn, or say why it is of no use: then it is computed.

        Returns what lets go the holder of a refused one, where it can be reached."""
        handoff = attempt.handoff
        assert handoff is not None, "accept is for attempts with a handoff"
        active.transferred_blocks = 0
        if handoff.handoff_id in self._used:
            _log_refused(active, handoff, "used before")
            return None
        reason = mismatch(handoff, attempt, self._card)
        if reason is not None:
            _log_refused(active, handoff, reason)
            if not self._card.transport or handoff.transport != self._card.transport:
                return None
            return Pull(active.attempt_id, handoff, [], [], self._timeout_s)
        self._used[handoff.handoff_id] = None
        if len(self._used) > USED_HANDOFFS:
            self._used.popitem(last=False)
        active.handoff = handoff
        active.handoff_deadline = now + handoff.ttl_s
        return None

    def begin(self, active: ActiveAttempt, now: float) -> Pull | None:
        """Start to pull what is not cached; the attempt has its blocks and a handoff.

        When there is something to read, the attempt is PULLING afterwards, and its blocks with their
        references belong to the pull until `done`. None when the handoff has expired."""
        handoff = active.handoff
        assert handoff is not None, "begin is for attempts with a handoff"
        left_s = active.handoff_deadline - now
        if left_s <= 0:
            active.handoff = None
            _log_refused(active, handoff, "expired while waiting")
            return None
        first, end = active.cached_blocks, self._blocks(handoff)
        pull = Pull(
            active.attempt_id,
            handoff,
            source_indices=list(range(first, end)),
            block_ids=active.block_ids[first:end],
            timeout_s=min(self._timeout_s, left_s),
        )
        if pull.block_ids:
            active.phase = AttemptPhase.PULLING
            deadline = now + pull.timeout_s + PULL_GRACE_S
            self._open[active.attempt_id] = _OpenPull(active, handoff, active.block_ids, deadline)
        else:
            active.handoff = None  # everything is cached: the holder is only told to let go
        return pull

    def works(self) -> list[PromptWork]:
        """What will be left to compute of those that wait for a pull, once it has succeeded."""
        lengths = [
            (pull.handoff.num_tokens, len(pull.active.token_ids))
            for pull in self._open.values()
            if pull.active is not None
        ]
        return [prompt_work(min(there, length - 1), length) for there, length in lengths]

    def abandon(self, attempt_id: str) -> None:
        """Its attempt does not wait any more."""
        self._open[attempt_id].active = None

    def late(self, now: float) -> list[ActiveAttempt]:
        """Attempts whose pull should have ended by now. They are abandoned by the call."""
        late = []
        for pull in self._open.values():
            if pull.active is not None and pull.deadline <= now:
                log.warning(
                    "KV transfer late: attempt=%s %s", pull.active.attempt_id, _source(pull.handoff)
                )
                late.append(pull.active)
                pull.active = None
        return late

    def done(self, attempt_id: str, pulled: Pulled) -> ActiveAttempt | None:
        """A pull has ended. Returns the attempt that waits for it, which has the blocks again if all
        arrived (`pulled.error` is None); else they are released. Unknown ids, of pulls that were only to
        make the holder let go, are ignored."""
        pull = self._open.pop(attempt_id, None)
        if pull is None:
            return None
        if pulled.error is None:
            log.info(
                "KV transfer done: attempt=%s transport=%s blocks=%d/%d bytes=%d ms=%.1f from=%s",
                attempt_id,
                pull.handoff.transport,
                pulled.blocks,
                self._blocks(pull.handoff),
                pulled.bytes,
                pulled.seconds * 1e3,
                pull.handoff.holder.instance_id,
            )
        else:
            log.warning(
                "KV transfer failed: attempt=%s %s ms=%.1f: %s",
                attempt_id,
                _source(pull.handoff),
                pulled.seconds * 1e3,
                pulled.error,
            )
        if pull.active is None or pulled.error is not None:
            self._pool.release(pull.block_ids)
        return pull.active

    def _blocks(self, handoff: Handoff) -> int:
        return -(-handoff.num_tokens // self._card.block_size)


def _log_refused(active: ActiveAttempt, handoff: Handoff, reason: str) -> None:
    log.warning(
        "KV transfer refused, computing instead: attempt=%s handoff=%s %s: %s",
        active.attempt_id,
        handoff.handoff_id,
        _source(handoff),
        reason,
    )


def _source(handoff: Handoff) -> str:
    return f"transport={handoff.transport} from={handoff.holder.instance_id}"
