"""Decisions for tests, with the costs that their workers' loads make."""

from __future__ import annotations

import random

import msgspec

from penstock.core.decision_record import Holder, Placing
from penstock.core.policy import Candidate, Decision, Query, choose
from penstock.shapes import Load, ModelKey, Rates, Request, Role, Sampling

RATES = Rates(step_ms=5.0, prefill_token_ms=0.1, decode_request_ms=0.1)


def candidate(
    name: str, role: Role = Role.AGGREGATED, *, cached: int = 0, queued: int = 0, running: int = 0
) -> Candidate:
    load = Load(running=running, prefill_tokens=queued, total_blocks=10_000, rates=RATES)
    return Candidate(name, role, load, block_size=16, overlap_blocks=cached // 16)


def decided(*candidates: Candidate, prompt: int = 13_000, **options: str) -> Decision:
    decision = choose(Query(prompt), candidates, rng=random.Random(0), **options)
    assert decision is not None
    return decision


def request(name: str = "c-0", prompt: int = 13_000, **fields: object) -> Request:
    usual = Request(name, ModelKey("m", "r"), [0] * prompt, Sampling(max_tokens=5), call_id=name[:-2])
    return msgspec.structs.replace(usual, **fields)


def placing(decision: Decision, holder: Holder | None = None, **fields: object) -> Placing:
    computes = decision.computes.candidate
    cached = computes.overlap_blocks * computes.block_size
    usual = Placing(10.5, decision, 0.25, "", frozenset(), 0, cached, holder, 0)
    return msgspec.structs.replace(usual, **fields)
