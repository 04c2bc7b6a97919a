"""Whether a prefill worker goes first: the cheaper of two plans for a decode worker, in milliseconds.

In the terms of core/costs.py:

    local(d)     = queue(d) + prefill(d) + inflicted(d) + delayed(d)
    remote(p, d) = max(queue(p) + prefill(p), queue(d)) + transfer(d) + delayed(p)
    delayed(w)   = prefill(w) * requests that wait in the frontend for w's pool / workers of the pool

On the remote path d's queue drains while p computes, and nobody's output stalls, as a prefill worker has
none. p is one of those whose KV d reads (core/pairing.py); without any, only the local plan is left.

What waits in the frontend is delayed as well, each request by the part of the pool's time that this prompt
takes. It waits for the pool in which a prompt could begin later: the prefill workers or those that decode.
Without this, prefill workers look nearly idle however much waits for them, as their own queues are short,
and prompts wait that decode workers could compute.

On idle workers a prompt moves when that takes less than IDLE_SHARE of the time to compute it. A prompt with
less than a block to compute has nothing worth handing over and stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import msgspec

from penstock.core.costs import OUTPUT_SHARE, Costs, Query
from penstock.shapes import Card, Role


class Disagg(StrEnum):
    """When a prefill worker goes first, if there is one."""

    AUTO = "auto"  # when that is cheaper
    ALWAYS = "always"  # with every decode worker that has one
    NEVER = "never"


class Path(StrEnum):
    """How a request is served."""

    AGGREGATED = "aggregated"  # all of it on an aggregated worker
    LOCAL = "local"  # all of it on a decode worker
    REMOTE = "remote"  # its prompt on a prefill worker, then its output on a decode worker


class Plan(msgspec.Struct, frozen=True, gc=False):
    """How a request would be served with this candidate to decode it, and what that would cost."""

    here: Costs  # of the candidate
    first: Costs | None  # of the prefill worker that goes first; None: none does, or none any more
    path: Path
    queue_ms: (
        float  # on the remote path the prefill worker's, or what is left of the candidate's own by then
    )
    prefill_ms: float
    inflicted_ms: float = 0.0
    transfer_ms: float = 0.0
    other_start_ms: float | None = None  # `start_ms` of the path not taken; None: there was none

    @property
    def instance_id(self) -> str:
        return self.here.candidate.instance_id

    @property
    def start_ms(self) -> float:
        """Until the first token, with what that costs the others."""
        return self.queue_ms + self.prefill_ms + self.inflicted_ms + self.transfer_ms

    @property
    def total_ms(self) -> float:
        """Lower is better."""
        return self.start_ms + OUTPUT_SHARE * self.here.decode_ms + self.here.missed_ms


def plan(
    query: Query, here: Costs, first: Costs | None, disagg: Disagg, *, awaits_prefill: bool = False
) -> Plan:
    """The better plan with the candidate of `here` decoding; `first` is of the prefill worker to use, if
    there is one for it. `awaits_prefill`: what waits in the frontend waits for a prefill worker."""
    candidate = here.candidate
    if query.handed is not None and query.handed == candidate.kv_format:  # the prompt is computed already
        return Plan(here, None, Path.REMOTE, here.queue_ms, 0.0, transfer_ms=here.transfer_ms)
    alone = Path.AGGREGATED if candidate.role is Role.AGGREGATED else Path.LOCAL
    delayed_ms = 0.0 if first is None or awaits_prefill else query.waiting_for_decode * here.prefill_ms
    local = Plan(here, None, alone, here.queue_ms, here.prefill_ms, here.inflicted_ms + delayed_ms)
    if first is None or disagg is Disagg.NEVER or candidate.role is Role.AGGREGATED:
        return local
    queue_ms = max(first.ready_ms, here.queue_ms) - first.prefill_ms
    delayed_ms = query.waiting_for_prefill * first.prefill_ms if awaits_prefill else 0.0
    remote = Plan(here, first, Path.REMOTE, queue_ms, first.prefill_ms, delayed_ms, here.transfer_ms)
    if disagg is Disagg.ALWAYS:
        return remote
    if here.uncached_tokens < candidate.block_size or local.start_ms <= remote.start_ms:
        return msgspec.structs.replace(local, other_start_ms=remote.start_ms)
    return msgspec.structs.replace(remote, other_start_ms=local.start_ms)


def waiting_for_each(waiting: int, cards: Sequence[Card]) -> tuple[float, float]:
    """How many of the requests that wait in the frontend there are for each prefill worker, and for each of
    the other workers."""
    if not waiting:
        return 0.0, 0.0
    prefills = sum(card.role is Role.PREFILL for card in cards)
    return waiting / max(1, prefills), waiting / max(1, len(cards) - prefills)
