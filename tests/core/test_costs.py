"""When a worker is full, in places, blocks and time between tokens."""

from __future__ import annotations

import random

import pytest
from msgspec.structs import replace

from penstock.core.costs import Candidate, OutputLengths, Query, costs, crowded
from penstock.core.policy import Path, choose
from penstock.shapes import Load, Rates, Role

RATES = Rates(step_ms=10.0, prefill_token_ms=0.05, decode_request_ms=0.1)
QUERY = Query(prompt_tokens=160, expected_output_tokens=100.0)


def candidate(
    instance_id: str = "a0", role: Role = Role.AGGREGATED, max_running: int = 0, **load: int
) -> Candidate:
    return Candidate(instance_id, role, Load(rates=RATES, **load), 16, max_running=max_running)


def wait_ms(query: Query, it: Candidate) -> float:
    return costs(query, it).queue_ms


def test_a_place_is_waited_for() -> None:
    step_ms = 10.0 + 0.1 * 8
    assert wait_ms(QUERY, candidate(max_running=8, running=7)) == 0.0
    assert wait_ms(QUERY, candidate(max_running=8, running=8)) == pytest.approx(100 * step_ms / 8)
    assert wait_ms(QUERY, candidate(max_running=8, running=8, waiting=3)) == pytest.approx(
        4 * 100 * step_ms / 8
    )
    assert wait_ms(QUERY, candidate(running=10_000)) == 0.0  # nobody said how many there are


def test_blocks_are_kept_for_those_that_run() -> None:
    room = candidate(running=10, used_blocks=0, total_blocks=100)
    # 10 needed, and 10 * 100 * 0.25 / 16 for the others
    assert wait_ms(QUERY, replace(room, load=replace(room.load, used_blocks=75))) == 0.0
    assert wait_ms(QUERY, replace(room, load=replace(room.load, used_blocks=76))) > 0.0
    prefill = candidate(role=Role.PREFILL, running=10, used_blocks=90, total_blocks=100)
    assert wait_ms(QUERY, prefill) == 0.0  # prompts do not grow
    assert wait_ms(QUERY, candidate(used_blocks=90, total_blocks=100)) == 0.0  # nobody to keep them for


def test_an_objective_for_the_time_between_tokens_limits_the_places() -> None:
    query = replace(QUERY, max_itl_ms=20.0)

    def with_running(it: Candidate, running: int) -> Candidate:
        return replace(it, load=replace(it.load, running=running))

    decode = candidate(role=Role.DECODE)
    assert not crowded(query, with_running(decode, 99))
    assert crowded(query, with_running(decode, 100))
    assert not crowded(QUERY, with_running(decode, 100))
    both = replace(decode, role=Role.AGGREGATED, prompt_tokens=800.0)  # 0.4 ms more for each
    assert not crowded(query, with_running(both, 19))
    assert crowded(query, with_running(both, 20))
    assert not crowded(replace(query, max_itl_ms=1.0), decode)  # one is always possible


def test_a_worker_with_a_free_place_is_preferred_and_the_lack_of_any_is_said() -> None:
    query = replace(QUERY, max_itl_ms=20.0)
    cached = replace(candidate("a0", running=120), overlap_blocks=9)
    free = candidate("a1", running=50)
    decision = choose(query, [cached, free], rng=random.Random(0))
    assert decision is not None
    assert (decision.decode, decision.crowded) == ("a1", False)
    decision = choose(query, [cached], rng=random.Random(0))
    assert decision is not None
    assert (decision.decode, decision.crowded) == ("a0", True)


def test_a_decision_says_how_long_the_least_busy_workers_take_to_begin() -> None:
    busy = candidate("a0", prefill_tokens=10_000)
    idle = candidate("a1", prefill_tokens=100)
    decision = choose(QUERY, [busy, idle], rng=random.Random(0))
    assert decision is not None
    assert decision.wait_ms == wait_ms(QUERY, idle)
    prefills = [candidate(f"p{n}", Role.PREFILL, prefill_tokens=n * 1000) for n in (3, 2)]
    decode = candidate("d0", Role.DECODE)
    remote = choose(QUERY, [*prefills, decode], disagg="always", rng=random.Random(0))
    assert remote is not None
    assert remote.path is Path.REMOTE
    assert remote.wait_ms == wait_ms(QUERY, prefills[1])


def test_output_lengths_are_learned() -> None:
    lengths = OutputLengths()
    assert lengths.mean("m", "t") is None
    lengths.ended("m", "t", 20, prior=110.0)
    assert lengths.mean("m", "t") == pytest.approx(100.0, rel=0.01)
    for _ in range(500):
        lengths.ended("m", "t", 20, prior=110.0)
    assert lengths.mean("m", "t") == pytest.approx(20, rel=0.05)
    assert lengths.mean("m", "other") is None
    for _ in range(2000):
        lengths.ended("m", "t", 0, prior=110.0)
    assert lengths.mean("m", "t") == 1.0
    lengths.forget("m")
    assert lengths.mean("m", "t") is None
