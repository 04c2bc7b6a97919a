"""KV held for others: the blocks of prompts that were prefilled here and are to be pulled from here.

    phase      event                    next       what happens
    ---------  -----------------------  ---------  ------------------------------------------
    (new)      hold                     OFFERED    the blocks stay referenced
    OFFERED    pulled                   (gone)     the blocks are released
    OFFERED    release, expiry          WITHDRAWN  Retract
    WITHDRAWN  retracted, not yet       WITHDRAWN  Retract again after RETRACT_RETRY_S
    WITHDRAWN  retracted; pulled        (gone)     the blocks are released

Blocks that a reader may still be reading are never released: only the transfer knows, and says so.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from penstock.core.hashing import block_hash, root_hash
from penstock.engines.active import ActiveAttempt
from penstock.engines.block_pool import BlockPool
from penstock.engines.effects import Export, Retract
from penstock.engines.settings import SchedulerSettings
from penstock.shapes import EngineCard, Handoff

log = logging.getLogger("penstock.engine")

RETRACT_RETRY_S = 0.25
"""Seconds until a transfer that was still reading is asked again; a read takes milliseconds, and one
whose reader died ends by the transfer's own timeout."""


@dataclass(slots=True)
class _Held:
    block_ids: list[int]
    since: float
    due: float  # when it is to be retracted, or asked for again
    withdrawn: bool = False


class HeldHandoffs:
    """All handoffs of this engine that have not been pulled or dropped. Times are seconds of one clock.

    Args:
        card, settings: what a handoff says of this engine.
        pool: where released blocks go.
    """

    def __init__(self, card: EngineCard, settings: SchedulerSettings, pool: BlockPool) -> None:
        self.expired = 0  # handoffs that nobody pulled or released in time
        self._pool = pool
        self._card = card
        self._settings = settings
        self._held: dict[str, _Held] = {}

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, handoff_id: str) -> bool:
        return handoff_id in self._held

    @property
    def next_deadline(self) -> float | None:
        """When `due` has something to do; None when nothing is held."""
        return min((held.due for held in self._held.values()), default=None)

    def block_ids(self) -> Iterator[list[int]]:
        """The blocks that each handoff holds."""
        return (held.block_ids for held in self._held.values())

    def hold(self, active: ActiveAttempt, now: float) -> Export:
        """Keep the blocks of this attempt's computed tokens; their references move here. All its whole
        blocks are cached."""
        block_ids, active.block_ids = active.block_ids, []
        due = now + self._settings.handoff_ttl_s
        self._held[active.attempt_id] = _Held(block_ids, now, due)
        whole = active.cached_blocks
        if whole:
            last_hash = self._pool.sequence_hash(block_ids[whole - 1])
        else:
            last_hash = root_hash(self._card.model.name, active.cache_salt)
        tail = active.token_ids[whole * self._card.block_size : active.computed]
        if tail:
            last_hash = block_hash(tail, last_hash)
        handoff = Handoff(
            handoff_id=active.attempt_id,
            holder=self._settings.holder,
            num_tokens=active.computed,
            block_size=self._card.block_size,
            last_hash=last_hash,
            layout=self._card.layout,
            ttl_s=self._settings.handoff_ttl_s,
            transport=self._card.transport,
            address="",  # the transfer says, with its params, on export
        )
        return Export(handoff, block_ids)

    def pulled(self, handoff_id: str, now: float) -> None:
        """Its reader has everything. Unknown ids are ignored."""
        held = self._held.pop(handoff_id, None)
        if held is not None:
            self._pool.release(held.block_ids)
            log.info(
                "KV transfer pulled: handoff=%s blocks=%d held_ms=%.1f",
                handoff_id,
                len(held.block_ids),
                (now - held.since) * 1e3,
            )

    def release(self, handoff_id: str) -> list[Retract]:
        """Nobody will pull it. Unknown ids are ignored."""
        held = self._held.get(handoff_id)
        if held is None or held.withdrawn:
            return []
        held.withdrawn = True
        log.info("KV transfer released unread: handoff=%s blocks=%d", handoff_id, len(held.block_ids))
        return [Retract(handoff_id)]

    def release_all(self) -> list[Retract]:
        """Nobody will pull any of them."""
        return [effect for handoff_id in self._held for effect in self.release(handoff_id)]

    def due(self, now: float) -> list[Retract]:
        """What has expired, and what is to be retracted again; each is answered by `retracted`."""
        effects = []
        for handoff_id, held in self._held.items():
            if held.due > now:
                continue
            if not held.withdrawn:
                held.withdrawn = True
                self.expired += 1
                log.warning(
                    "KV transfer expired: handoff=%s blocks=%d was not pulled within %g s",
                    handoff_id,
                    len(held.block_ids),
                    self._settings.handoff_ttl_s,
                )
            effects.append(Retract(handoff_id))
        return effects

    def retracted(self, handoff_id: str, done: bool, now: float) -> None:
        """The transfer's answer: `done` when nobody reads these blocks and nobody will."""
        held = self._held.get(handoff_id)
        if held is None:
            return
        if done:
            del self._held[handoff_id]
            self._pool.release(held.block_ids)
        else:
            held.due = now + RETRACT_RETRY_S
