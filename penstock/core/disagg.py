"""Whether a prefill worker goes first: the cheaper of two plans for a decode worker, in milliseconds.

In the terms of core/scorers.py:

    local(d)     = queue(d) + prefill(d) + inflicted(d)
    remote(p, d) = max(queue(p) + prefill(p), queue(d)) + transfer(d)

On the remote path d's queue drains while p computes, and nobody's output stalls, as a prefill worker has
none. On idle workers `inflicted` is about `prefill`, so a prompt moves exactly when that costs less than
computing it. A prompt with less than a block to compute has nothing worth handing over and stays.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from penstock.core.scorers import (
    Candidate,
    Query,
    decode_ms,
    inflicted_ms,
    prefill_ms,
    queue_ms,
    transfer_ms,
    uncached_tokens,
)
from penstock.structs import Role


class Disagg(StrEnum):
    """When a prefill worker goes first, if there is one."""

    AUTO = "auto"  # when that is cheaper
    ALWAYS = "always"
    NEVER = "never"


class Path(StrEnum):
    """How a request is served."""

    AGGREGATED = "aggregated"  # all of it on an aggregated worker
    LOCAL = "local"  # all of it on a decode worker
    REMOTE = "remote"  # its prompt on a prefill worker, then its output on a decode worker


class Ahead(msgspec.Struct, frozen=True):
    """A prefill worker, and the time until it has the prompt's KV."""

    instance_id: str
    queue_ms: float
    prefill_ms: float

    @property
    def total_ms(self) -> float:
        return self.queue_ms + self.prefill_ms


class Scored(msgspec.Struct, frozen=True):
    """What a request would cost with this candidate to decode it, and of what that consists.

    `total_ms`, lower is better, is the sum of the terms before it; on the remote path `queue_ms` is the
    prefill worker's, or what of the candidate's own is left when the prompt is ready.
    """

    instance_id: str
    path: Path
    overlap_blocks: int
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


def ahead(query: Query, candidate: Candidate) -> Ahead:
    """What a prefill worker would need."""
    return Ahead(candidate.instance_id, queue_ms(query, candidate), prefill_ms(query, candidate))


def plan(query: Query, candidate: Candidate, first: Ahead | None, disagg: Disagg) -> Scored:
    """The better plan with this candidate decoding; `first` is the prefill worker to use, if any."""
    if query.handed:
        queue = queue_ms(query, candidate)
        return _scored(query, candidate, Path.REMOTE, queue=queue, transfer=transfer_ms(query, candidate))
    if candidate.role is Role.AGGREGATED or first is None or disagg is Disagg.NEVER:
        return _local(query, candidate)
    remote = _remote(query, candidate, first)
    if disagg is Disagg.ALWAYS:
        return remote
    local = _local(query, candidate)
    if local.uncached_tokens < candidate.block_size or local.start_ms <= remote.start_ms:
        better, worse = local, remote
    else:
        better, worse = remote, local
    return msgspec.structs.replace(better, other_ms=worse.start_ms)


def _local(query: Query, candidate: Candidate) -> Scored:
    return _scored(
        query,
        candidate,
        Path.AGGREGATED if candidate.role is Role.AGGREGATED else Path.LOCAL,
        queue=queue_ms(query, candidate),
        prefill=prefill_ms(query, candidate),
        inflicted=inflicted_ms(query, candidate),
    )


def _remote(query: Query, candidate: Candidate, first: Ahead) -> Scored:
    left_ms = max(0.0, queue_ms(query, candidate) - first.total_ms)
    return _scored(
        query,
        candidate,
        Path.REMOTE,
        queue=first.queue_ms + left_ms,
        prefill=first.prefill_ms,
        transfer=transfer_ms(query, candidate),
    )


def _scored(
    query: Query,
    candidate: Candidate,
    path: Path,
    *,
    queue: float,
    prefill: float = 0.0,
    inflicted: float = 0.0,
    transfer: float = 0.0,
) -> Scored:
    decode = decode_ms(query, candidate)
    return Scored(
        instance_id=candidate.instance_id,
        path=path,
        overlap_blocks=candidate.overlap_blocks,
        uncached_tokens=uncached_tokens(query, candidate),
        queue_ms=queue,
        prefill_ms=prefill,
        inflicted_ms=inflicted,
        transfer_ms=transfer,
        decode_ms=decode,
        total_ms=queue + prefill + inflicted + transfer + decode,
    )
