"""Whether a prefill worker goes first: the cheaper of two plans for a decode worker, in milliseconds.

In the terms of core/costs.py:

    local(d)     = queue(d) + prefill(d) + inflicted(d)
    remote(p, d) = max(queue(p) + prefill(p), queue(d)) + transfer(d)

On the remote path d's queue drains while p computes, and nobody's output stalls, as a prefill worker has
none. p is one of those whose KV d reads (core/pairing.py); without any, only the local plan is left.
On idle workers `inflicted` is about `prefill`, so a prompt moves exactly when that costs less than
computing it. A prompt with less than a block to compute has nothing worth handing over and stays.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from penstock.core.costs import Costs, Query
from penstock.shapes import Role


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


class Scored(msgspec.Struct, frozen=True, gc=False):
    """What a request would cost with this candidate to decode it, and of what that consists.

    `total_ms`, lower is better, is the sum of the terms before it; on the remote path `queue_ms` is the
    prefill worker's, or what of the candidate's own is left when the prompt is ready.
    """

    instance_id: str
    path: Path
    overlap_blocks: int  # this and the next: of the candidate itself, on either path
    uncached_tokens: int
    queue_ms: float
    prefill_ms: float
    inflicted_ms: float
    transfer_ms: float
    decode_ms: float
    total_ms: float
    other_ms: float | None = None  # until the first token by the path not taken; None: there was none

    @property
    def start_ms(self) -> float:
        """Until the first token, with what that costs the others."""
        return self.total_ms - self.decode_ms


def plan(query: Query, here: Costs, first: Costs | None, disagg: Disagg) -> Scored:
    """The better plan with the candidate of `here` decoding; `first` is of the prefill worker to use, if
    there is one for it."""
    if query.handed is not None and query.handed == here.candidate.kv_format:
        return _remote(here, None)
    if first is None or disagg is Disagg.NEVER or here.candidate.role is Role.AGGREGATED:
        return _local(here)
    if disagg is Disagg.ALWAYS:
        return _remote(here, first)
    local, remote = _local(here), _remote(here, first)
    if here.uncached_tokens < here.candidate.block_size or local.start_ms <= remote.start_ms:
        return msgspec.structs.replace(local, other_ms=remote.start_ms)
    return msgspec.structs.replace(remote, other_ms=local.start_ms)


def _local(here: Costs) -> Scored:
    return _scored(
        here,
        Path.AGGREGATED if here.candidate.role is Role.AGGREGATED else Path.LOCAL,
        queue_ms=here.queue_ms,
        prefill_ms=here.prefill_ms,
        inflicted_ms=here.inflicted_ms,
    )


def _remote(here: Costs, first: Costs | None) -> Scored:
    """`first` is None when the prompt has been computed already."""
    if first is None:
        queue_ms, prefill_ms = here.queue_ms, 0.0
    else:
        queue_ms = max(first.ready_ms, here.queue_ms) - first.prefill_ms
        prefill_ms = first.prefill_ms
    return _scored(
        here, Path.REMOTE, queue_ms=queue_ms, prefill_ms=prefill_ms, transfer_ms=here.transfer_ms
    )


def _scored(
    here: Costs,
    path: Path,
    *,
    queue_ms: float,
    prefill_ms: float,
    inflicted_ms: float = 0.0,
    transfer_ms: float = 0.0,
) -> Scored:
    return Scored(
        instance_id=here.candidate.instance_id,
        path=path,
        overlap_blocks=here.candidate.overlap_blocks,
        uncached_tokens=here.uncached_tokens,
        queue_ms=queue_ms,
        prefill_ms=prefill_ms,
        inflicted_ms=inflicted_ms,
        transfer_ms=transfer_ms,
        decode_ms=here.decode_ms,
        total_ms=queue_ms + prefill_ms + inflicted_ms + transfer_ms + here.decode_ms,
    )
