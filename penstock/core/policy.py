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
from typing import Any, NamedTuple, TypeVar

import msgspec

from penstock.core.costs import Candidate, Costs, Query, costs, crowded
from penstock.core.disagg import Disagg, Path, Plan, plan
from penstock.core.pairing import KvFormat

__all__ = ["POLICIES", "Candidate", "Decision", "Disagg", "Path", "Plan", "Query", "choose"]

_Item = TypeVar("_Item")
_queue_ms = attrgetter("queue_ms")
_ready_ms = attrgetter("ready_ms")
_total_ms = attrgetter("total_ms")


class Decision(msgspec.Struct, frozen=True):
    """Where a request goes. `prefill` is set exactly when a prefill worker goes first. `plans` are those
    that were compared, cheapest first. `wait_ms` is the least time in which workers could begin it, and
    `ahead` how many requests they would begin before: not necessarily those that are chosen, as one may be
    busier and yet the better choice for what it has cached. `crowded`: on each of them, it would slow down
    the others' tokens too much."""

    decode: str
    prefill: str | None
    path: Path
    plans: list[Plan]
    wait_ms: float
    ahead: int
    crowded: bool


class _Prefill(NamedTuple):
    """Of the prefill workers with KV of one format: the one to use, and the one that could begin first."""

    chosen: Costs
    soonest: Costs


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
    shortlist, mode = POLICIES[policy], Disagg(disagg)
    decoders = [candidate for candidate in candidates if candidate.role.decodes]
    if not decoders:
        return None
    free = [candidate for candidate in decoders if not crowded(query, candidate)]
    decoders = free or decoders
    takers = [it for it in decoders if it.kv_format == query.handed] if query.handed else []
    prefills: dict[KvFormat, _Prefill] = {}
    if mode is not Disagg.NEVER and not takers:
        prefills = _prefills(query, candidates, decoders, shortlist, rng)
    plans, here = [], [costs(query, candidate) for candidate in shortlist(query, takers or decoders, rng)]
    for each in here:
        prefill = prefills.get(each.candidate.kv_format)
        plans.append(plan(query, each, prefill.chosen if prefill is not None else None, mode))
    best = _least(plans, _total_ms, rng)
    soonest = _soonest(query, decoders, here)
    if best.first is not None:
        soonest = max(soonest, prefills[best.here.candidate.kv_format].soonest, key=_queue_ms)
    return Decision(
        decode=best.instance_id,
        prefill=best.first.candidate.instance_id if best.first is not None else None,
        path=best.path,
        plans=sorted(plans, key=_total_ms),
        wait_ms=soonest.queue_ms,
        ahead=soonest.candidate.load.waiting,
        crowded=not free,
    )


def _prefills(
    query: Query,
    candidates: Sequence[Candidate],
    decoders: Sequence[Candidate],
    shortlist: Shortlist,
    rng: Random,
) -> dict[KvFormat, _Prefill]:
    """For each format that a decode worker reads, if there are prefill workers with it."""
    pools: dict[KvFormat, list[Candidate]] = {}
    read = {candidate.kv_format for candidate in decoders}
    for candidate in candidates:
        if not candidate.role.decodes and candidate.kv_format in read:
            pools.setdefault(candidate.kv_format, []).append(candidate)
    prefills = {}
    for kv_format, pool in pools.items():
        listed = [costs(query, candidate) for candidate in shortlist(query, pool, rng)]
        prefills[kv_format] = _Prefill(_least(listed, _ready_ms, rng), _soonest(query, pool, listed))
    return prefills


def _least(items: Sequence[_Item], key: Callable[[_Item], Any], rng: Random) -> _Item:
    """The item with the least key; one of them at random when there are several."""
    keys = [key(item) for item in items]
    least = min(keys)
    return rng.choice([item for item, its in zip(items, keys, strict=True) if its == least])


def _soonest(query: Query, pool: Sequence[Candidate], listed: Sequence[Costs]) -> Costs:
    """Who of the whole pool could begin first, however few of it are on the shortlist: nobody is told to
    wait, or sent away, because a policy drew a busy worker."""
    if len(listed) < len(pool):
        listed = [costs(query, candidate) for candidate in pool]
    return min(listed, key=_queue_ms)


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
