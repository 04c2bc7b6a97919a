"""Which worker serves a request.

A policy shortlists the workers of a pool; among those left, the cheapest plan wins, with ties broken by
the random generator. So every policy uses the same costs to decide between local and remote prefill
(core/disagg.py), and `kv`, which shortlists everybody, is nothing but the costs:

    prefill worker   p*(d) = argmin queue(p) + prefill(p), of those whose KV d reads (core/pairing.py)
    decode worker    d* = argmin min(local(d), remote(p*(d), d)) + decode(d)
    aggregated       a competes with the decode workers by local(a) + decode(a)

    policy         shortlist of each pool
    -------------  --------------------------------------------------------------------
    kv             all
    round-robin    the next one, in order of instance ids
    random         any one
    least-loaded   those with the fewest requests, then the fewest prompt tokens to compute
    power-of-two   the less loaded of two random ones

Pure: no state, no side effects; equal arguments and an equally seeded generator give equal decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from random import Random
from typing import Any, TypeVar

import msgspec

from penstock.core.costs import Candidate, Costs, Query, costs, crowded
from penstock.core.disagg import Disagg, Path, Scored, plan
from penstock.core.pairing import KvFormat

__all__ = ["POLICIES", "Candidate", "Decision", "Disagg", "Path", "Query", "Scored", "choose"]


class Decision(msgspec.Struct, frozen=True):
    """Where a request goes. `prefill` is set exactly when a prefill worker goes first. `scores` are
    the plans that were compared, cheapest first. `wait_ms` is the least time in which workers could begin
    it, if not necessarily these: one may be busier, and yet the better choice for what it has cached.
    `crowded`: on each of them, it would slow down the others' tokens too much."""

    decode: str
    prefill: str | None
    path: Path
    reason: str
    scores: list[Scored]
    wait_ms: float = 0.0
    crowded: bool = False


Shortlist = Callable[[Query, Sequence[Candidate], Random], Sequence[Candidate]]


def choose(
    query: Query,
    candidates: Sequence[Candidate],
    *,
    policy: str = "kv",
    disagg: str = Disagg.AUTO,
    rng: Random,
) -> Decision | None:
    """Place a request on the candidates, which all serve its model and take new attempts now.

    Args:
        policy: a key of POLICIES.
        disagg: a value of Disagg.
        rng: breaks ties, and draws for the random policies.

    Returns:
        None when no candidate can decode.
    """
    shortlist = POLICIES[policy]
    mode = Disagg(disagg)
    decoders = [candidate for candidate in candidates if candidate.role.decodes]
    if not decoders:
        return None
    free = [candidate for candidate in decoders if not crowded(query, candidate)]
    decoders = free or decoders
    takers = [it for it in decoders if it.kv_format == query.handed] if query.handed else []
    firsts = {}
    if mode is not Disagg.NEVER and not takers:
        firsts = _firsts(query, candidates, decoders, shortlist, rng)
    here = [costs(query, candidate) for candidate in shortlist(query, takers or decoders, rng)]
    plans = [_plan(query, it, firsts.get(it.candidate.kv_format), mode) for it in here]
    best, first = _least(plans, _plan_ms, rng)
    wait_ms = _least_wait_ms(query, decoders, here)
    if first is not None:
        wait_ms = max(wait_ms, first.wait_ms)
    return Decision(
        decode=best.instance_id,
        prefill=first.costs.candidate.instance_id if first is not None else None,
        path=best.path,
        reason=_reason(best),
        scores=sorted((scored for scored, _ in plans), key=_total_ms),
        wait_ms=wait_ms,
        crowded=not free,
    )


class _First(msgspec.Struct, frozen=True):
    """The prefill worker to use among those with KV of one format; `wait_ms`: the least of any of them."""

    costs: Costs
    wait_ms: float


def _firsts(
    query: Query,
    candidates: Sequence[Candidate],
    decoders: Sequence[Candidate],
    shortlist: Shortlist,
    rng: Random,
) -> dict[KvFormat, _First]:
    """For each format that a decode worker reads, if there are prefill workers with it."""
    pools: dict[KvFormat, list[Candidate]] = {}
    read = {candidate.kv_format for candidate in decoders}
    for candidate in candidates:
        if not candidate.role.decodes and candidate.kv_format in read:
            pools.setdefault(candidate.kv_format, []).append(candidate)
    firsts = {}
    for kv_format, pool in pools.items():
        ahead = [costs(query, candidate) for candidate in shortlist(query, pool, rng)]
        firsts[kv_format] = _First(_least(ahead, _ready_ms, rng), _least_wait_ms(query, pool, ahead))
    return firsts


def _plan(query: Query, here: Costs, first: _First | None, mode: Disagg) -> tuple[Scored, _First | None]:
    """The better plan with this candidate decoding, and the prefill worker that is used in it."""
    if first is None:
        return plan(query, here, None, mode), None
    scored = plan(query, here, first.costs, mode)
    return scored, first if scored.path is Path.REMOTE else None


def _plan_ms(found: tuple[Scored, _First | None]) -> float:
    return found[0].total_ms


_Item = TypeVar("_Item")
_total_ms = attrgetter("total_ms")
_ready_ms = attrgetter("ready_ms")
_queue_ms = attrgetter("queue_ms")


def _least(items: Sequence[_Item], key: Callable[[_Item], Any], rng: Random) -> _Item:
    """The item with the least key; one of them at random when there are several."""
    keys = [key(item) for item in items]
    least = min(keys)
    return rng.choice([item for item, its in zip(items, keys, strict=True) if its == least])


def _least_wait_ms(query: Query, pool: Sequence[Candidate], known: Sequence[Costs]) -> float:
    """Of the whole pool, however few of it are on the shortlist (`known`): nobody is told to wait, or sent
    away, because a policy drew a busy worker."""
    if len(known) < len(pool):
        known = [costs(query, candidate) for candidate in pool]
    return min(it.queue_ms for it in known)


def _reason(best: Scored) -> str:
    """In words for the log, e.g. `remote: uncached 96 tokens, local 21.3 ms > remote 14.2 ms`."""
    reason = f"{best.path}: uncached {best.uncached_tokens} tokens, "
    if best.other_ms is None:
        return reason + f"{best.start_ms:.1f} ms"
    if best.path is Path.REMOTE:
        return reason + f"local {best.other_ms:.1f} ms > remote {best.start_ms:.1f} ms"
    if best.start_ms <= best.other_ms:
        return reason + f"local {best.start_ms:.1f} ms <= remote {best.other_ms:.1f} ms"
    return reason + "less than a block"


# --- shortlists -----------------------------------------------------------------------------------


def _all(query: Query, pool: Sequence[Candidate], rng: Random) -> Sequence[Candidate]:
    return pool


def _next(query: Query, pool: Sequence[Candidate], rng: Random) -> Sequence[Candidate]:
    in_order = sorted(pool, key=lambda candidate: candidate.instance_id)
    return [in_order[query.ordinal % len(in_order)]]


def _any(query: Query, pool: Sequence[Candidate], rng: Random) -> Sequence[Candidate]:
    return [rng.choice(pool)]


def _least_loaded(query: Query, pool: Sequence[Candidate], rng: Random) -> Sequence[Candidate]:
    return [_least(pool, _work, rng)]


def _power_of_two(query: Query, pool: Sequence[Candidate], rng: Random) -> Sequence[Candidate]:
    return _least_loaded(query, rng.sample(pool, min(2, len(pool))), rng)


def _work(candidate: Candidate) -> tuple[int, int]:
    load = candidate.load
    return load.running + load.waiting, load.prefill_tokens


POLICIES: Mapping[str, Shortlist] = {
    "kv": _all,
    "round-robin": _next,
    "random": _any,
    "least-loaded": _least_loaded,
    "power-of-two": _power_of_two,
}
