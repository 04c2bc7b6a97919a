"""Which worker serves a request.

A policy (core/policies.py) shortlists the workers of a pool; among those left, the cheapest plan wins, with
ties broken by the random generator. So every policy uses the same costs to decide between local and remote
prefill (core/disagg.py), and `kv`, which shortlists everybody, is nothing but the costs:

    prefill worker   p*(d) = argmin queue(p) + prefill(p), of those whose KV d reads (core/pairing.py)
    decode worker    d* = argmin min(local(d), remote(p*(d), d)) + OUTPUT_SHARE * decode(d) + missed(d)
    aggregated       a competes with the decode workers by local(a) + OUTPUT_SHARE * decode(a) + missed(a)

Pure: no state, no side effects; equal arguments and an equally seeded generator give equal decisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from random import Random
from typing import NamedTuple, TypeVar

import msgspec

from penstock.core.costs import Candidate, Costs, Query, costs
from penstock.core.disagg import Disagg, Path, Plan, plan
from penstock.core.pairing import KvFormat
from penstock.core.policies import Policy, policy_named

__all__ = ["Candidate", "Decision", "Disagg", "Path", "Plan", "Query", "choose"]

_Item = TypeVar("_Item")
_queue_ms = attrgetter("queue_ms")


class Decision(msgspec.Struct, frozen=True):
    """Where a request goes. `prefill` is set exactly when a prefill worker goes first. `plans` are those
    that were compared, cheapest first. `wait_ms` is the least time in which workers could begin it, and
    `ahead` how many requests they would begin before: not necessarily those that are chosen, as one may be
    busier and yet the better choice for what it has cached."""

    decode: str
    prefill: str | None
    path: Path
    plans: list[Plan]
    wait_ms: float
    ahead: int
    query: Query = Query(0)
    prefills: Sequence[Costs] = ()  # of the prefill workers that were compared, in any order
    plans_left_out: int = 0  # that were found dearer, in a large pool (core/cost_columns.py)

    @property
    def chosen(self) -> Plan:
        """The plan that is carried out."""
        for it in self.plans:  # nearly always the first one
            if it.instance_id == self.decode:
                return it
        raise LookupError(f"no plan was compared for {self.decode}")

    def compared(self, instance_id: str) -> bool:
        """Whether this worker was compared with others, for either part."""
        return any(plan.instance_id == instance_id for plan in self.plans) or any(
            each.candidate.instance_id == instance_id for each in self.prefills
        )

    @property
    def computes(self) -> Costs:
        """Of the worker that computes the prompt."""
        plan = self.chosen
        return plan.first or plan.here


class _Prefill(NamedTuple):
    """Of the prefill workers with KV of one format: the one to use, the one that could begin first, and all
    that were compared."""

    chosen: Costs
    soonest: Costs
    listed: Sequence[Costs]


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
        policy: the name of a policy.
        disagg: a value of Disagg.
        rng: breaks ties, and draws for the random policies.

    Returns:
        None when no candidate can decode.
    """
    shortlist, mode = policy_named(policy), Disagg(disagg)
    decoders = [candidate for candidate in candidates if candidate.role.decodes]
    if not decoders:
        return None
    takers = [it for it in decoders if it.kv_format == query.handed] if query.handed else []
    prefills: dict[KvFormat, _Prefill] = {}
    if mode is not Disagg.NEVER and not takers and len(decoders) < len(candidates):
        prefills = _prefills(query, candidates, decoders, shortlist, rng)
    if takers or prefills:
        query = msgspec.structs.replace(query, computed_elsewhere=True)
    plans, here = [], [costs(query, candidate) for candidate in shortlist(query, takers or decoders, rng)]
    soonest = _soonest(query, decoders, here)
    for each in here:
        prefill = prefills.get(each.candidate.kv_format) if prefills else None
        first = prefill.chosen if prefill is not None else None
        awaits_prefill = prefill is not None and prefill.soonest.queue_ms >= soonest.queue_ms
        plans.append(plan(query, each, first, mode, awaits_prefill=awaits_prefill))
    totals_ms = [it.total_ms for it in plans]
    best = _least(plans, totals_ms, rng)
    if best.first is not None:
        soonest = max(soonest, prefills[best.here.candidate.kv_format].soonest, key=_queue_ms)
    return Decision(
        decode=best.instance_id,
        prefill=best.first.candidate.instance_id if best.first is not None else None,
        path=best.path,
        plans=[plans[place] for place in sorted(range(len(plans)), key=totals_ms.__getitem__)],
        wait_ms=soonest.queue_ms,
        ahead=soonest.candidate.load.waiting,
        query=query,
        prefills=[each for prefill in prefills.values() for each in prefill.listed],
    )


def _prefills(
    query: Query,
    candidates: Sequence[Candidate],
    decoders: Sequence[Candidate],
    shortlist: Policy,
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
        chosen = _least(listed, [it.ready_ms for it in listed], rng)
        prefills[kv_format] = _Prefill(chosen, _soonest(query, pool, listed), listed)
    return prefills


def _least(items: Sequence[_Item], figures: Sequence[float], rng: Random) -> _Item:
    """The item with the least figure; one of them at random when there are several."""
    least = min(figures)
    return rng.choice([item for item, its in zip(items, figures, strict=True) if its == least])


def _soonest(query: Query, pool: Sequence[Candidate], listed: Sequence[Costs]) -> Costs:
    """Who of the whole pool could begin first, however few of it are on the shortlist: nobody is told to
    wait, or sent away, because a policy drew a busy worker."""
    if len(listed) < len(pool):
        listed = [costs(query, candidate) for candidate in pool]
    return min(listed, key=_queue_ms)
