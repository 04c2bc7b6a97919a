"""Decisions on small pools, each told as a story."""

from random import Random
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

from penstock.core.decision_words import plan_costs_ms
from penstock.core.pairing import KvFormat
from penstock.core.policies import POLICIES
from penstock.core.policy import Candidate, Decision, Disagg, Path, Query, choose
from penstock.errors import ConfigError
from penstock.shapes import Load, Rates, Role

ANY = KvFormat()
RATES = Rates(step_ms=1.0, prefill_token_ms=0.15, decode_request_ms=0.3, transfer_ms=3.0)


def worker(
    instance_id: str,
    role: Role = Role.AGGREGATED,
    *,
    overlap_blocks: int = 0,
    rates: Rates = RATES,
    running: int = 0,
    waiting: int = 0,
    prefill_tokens: int = 0,
    used_blocks: int = 0,
    kv_format: KvFormat = ANY,
) -> Candidate:
    load = Load(
        running=running,
        waiting=waiting,
        prefill_tokens=prefill_tokens,
        used_blocks=used_blocks,
        total_blocks=1000,
        rates=rates,
    )
    return Candidate(
        instance_id, role, load, block_size=16, overlap_blocks=overlap_blocks, kv_format=kv_format
    )


def decide(query: Query, *candidates: Candidate, policy: str = "kv", disagg: str = "auto") -> Decision:
    decision = choose(query, candidates, policy=policy, disagg=disagg, rng=Random(0))
    assert decision is not None
    return decision


def test_nobody_can_serve() -> None:
    assert choose(Query(10), [], rng=Random(0)) is None
    assert choose(Query(10), [worker("p", Role.PREFILL)], rng=Random(0)) is None


def test_unknown_names_are_our_bug() -> None:
    with pytest.raises(ConfigError, match="unknown policy 'best'"):
        decide(Query(10), worker("a"), policy="best")
    with pytest.raises(ValueError, match="sometimes"):
        decide(Query(10), worker("a"), disagg="sometimes")


# --- one pool ---------------------------------------------------------------------------------------


def test_the_cached_prefix_wins_on_equal_load() -> None:
    decision = decide(Query(1000), worker("a"), worker("b", overlap_blocks=50), worker("c"))
    assert decision.decode == "b"
    assert decision.prefill is None
    assert decision.path is Path.AGGREGATED
    assert decision.plans[0].here.uncached_tokens == 200
    assert decision.plans[0].instance_id == "b"
    assert decision.plans[0].total_ms < decision.plans[1].total_ms


def test_a_long_queue_outweighs_the_cache() -> None:
    busy = worker("b", overlap_blocks=50, prefill_tokens=5000, waiting=3)
    assert decide(Query(1000), worker("a"), busy).decode == "a"


def test_a_short_queue_does_not() -> None:
    assert (
        decide(Query(1000), worker("a"), worker("b", overlap_blocks=50, prefill_tokens=300)).decode == "b"
    )


def test_resident_context_is_no_reason_to_give_up_a_prefix() -> None:
    """Four streams decoding cost a new request far less than 800 tokens to compute."""
    busy = worker("b", overlap_blocks=50, running=4, used_blocks=700)
    cheap_decode = Rates(step_ms=10.0, prefill_token_ms=0.5, decode_request_ms=0.02)
    assert (
        decide(
            Query(1000, expected_output_tokens=200),
            worker("a", rates=cheap_decode),
            Candidate("b", busy.role, _with_rates(busy.load, cheap_decode), 16, 50),
        ).decode
        == "b"
    )


def _with_rates(load: Load, rates: Rates) -> Load:
    return Load(running=load.running, used_blocks=load.used_blocks, total_blocks=1000, rates=rates)


def test_the_faster_worker_wins() -> None:
    slow = Rates(step_ms=5.0, prefill_token_ms=1.0, decode_request_ms=1.0)
    assert decide(Query(100), worker("slow", rates=slow), worker("fast")).decode == "fast"


def test_full_blocks_are_avoided() -> None:
    full = worker("full", overlap_blocks=30, running=2, waiting=1, used_blocks=1000)
    free = worker("free", running=2)
    assert decide(Query(1000), full, free).decode == "free"
    alone = decide(Query(1000), full)
    assert alone.decode == "full"
    assert alone.plans[0].queue_ms > 100


def test_ties_are_broken_by_the_generator() -> None:
    pool = [worker(name) for name in "abcd"]
    chosen = {choose(Query(100), pool, rng=Random(seed)).decode for seed in range(50)}  # type: ignore[union-attr]
    assert chosen == set("abcd")


# --- prefill workers --------------------------------------------------------------------------------

PD = (worker("p", Role.PREFILL), worker("d", Role.DECODE))


@pytest.mark.parametrize("tokens", [400, 1000, 4000])
@pytest.mark.parametrize("prefill_token_ms", [0.1, 0.2])
@pytest.mark.parametrize("transfer_ms", [2.0, 5.0])
def test_a_long_prompt_on_idle_workers_is_prefilled_remotely(
    tokens: int, prefill_token_ms: float, transfer_ms: float
) -> None:
    rates = Rates(1.0, prefill_token_ms, 0.3, transfer_ms, 0.05)
    decision = decide(
        Query(tokens), worker("p", Role.PREFILL, rates=rates), worker("d", Role.DECODE, rates=rates)
    )
    assert (decision.path, decision.decode, decision.prefill) == (Path.REMOTE, "d", "p")


@pytest.mark.parametrize("tokens", [30, 60, 100])
def test_a_prompt_on_idle_workers_that_is_computed_faster_than_moved_stays_local(tokens: int) -> None:
    rates = Rates(1.0, 0.1, 0.3, 5.0, 0.05)
    decision = decide(
        Query(tokens), worker("p", Role.PREFILL, rates=rates), worker("d", Role.DECODE, rates=rates)
    )
    assert (decision.path, decision.decode, decision.prefill) == (Path.LOCAL, "d", None)


@pytest.mark.parametrize("prefill_token_ms", [0.1, 0.2, 10.0])
def test_less_than_a_block_to_compute_stays_local(prefill_token_ms: float) -> None:
    rates = Rates(1.0, prefill_token_ms, 0.3, 2.0, 0.05)
    pool = (
        worker("p", Role.PREFILL, rates=rates),
        worker("d", Role.DECODE, rates=rates, overlap_blocks=10),
    )
    decision = decide(Query(175), *pool)
    assert (decision.path, decision.decode, decision.prefill) == (Path.LOCAL, "d", None)
    assert decision.plans[0].here.uncached_tokens == 15


def test_a_plan_has_the_costs_of_both_paths() -> None:
    (remote,) = decide(Query(96), *PD).plans
    assert (remote.path, remote.start_ms, remote.other_start_ms) == (
        Path.REMOTE,
        pytest.approx(18.5, abs=0.05),
        pytest.approx(22.6, abs=0.05),
    )
    busy_prefill = worker("p", Role.PREFILL, prefill_tokens=10_000)
    (local,) = decide(Query(96), busy_prefill, PD[1]).plans
    assert local.other_start_ms is not None
    assert (local.path, local.start_ms < local.other_start_ms) == (Path.LOCAL, True)


def test_a_conversation_that_the_decode_worker_knows_needs_no_prefill_worker() -> None:
    pool = (worker("p", Role.PREFILL), worker("d", Role.DECODE, overlap_blocks=62))
    assert decide(Query(1010), *pool).path is Path.LOCAL


def test_a_busy_decode_worker_gives_its_prompts_away_sooner() -> None:
    rates = Rates(1.0, 0.15, 0.3, transfer_ms=30.0)
    prefill = worker("p", Role.PREFILL, rates=rates)
    idle, busy = (worker("d", Role.DECODE, rates=rates, running=running) for running in (0, 16))
    assert decide(Query(100), prefill, idle).path is Path.LOCAL
    assert decide(Query(100), prefill, busy).path is Path.REMOTE


def test_while_others_wait_for_prefill_workers_a_decode_worker_computes_a_prompt() -> None:
    pool = (worker("p", Role.PREFILL, prefill_tokens=100), worker("d", Role.DECODE, running=4))
    alone, few, many = (
        decide(Query(1000, waiting_for_prefill=waiting), *pool) for waiting in (0.0, 0.25, 4.0)
    )
    assert [it.path for it in (alone, few, many)] == [Path.REMOTE, Path.REMOTE, Path.LOCAL]
    assert alone.wait_ms == few.wait_ms > 0.0
    assert many.wait_ms == 0.0
    start_ms, prefill_ms = alone.chosen.start_ms, alone.chosen.prefill_ms
    assert few.chosen.start_ms == pytest.approx(start_ms + prefill_ms / 4)
    assert many.chosen.other_start_ms == pytest.approx(start_ms + 4 * prefill_ms)


def test_while_others_wait_for_decode_workers_a_prefill_worker_computes_a_prompt() -> None:
    rates = Rates(1.0, 0.15, 0.3, transfer_ms=100.0)
    pool = (
        worker("p", Role.PREFILL, rates=rates),
        worker("d", Role.DECODE, rates=rates, prefill_tokens=500),
    )
    alone, many = (
        decide(Query(200, waiting_for_prefill=waiting, waiting_for_decode=waiting), *pool)
        for waiting in (0, 4)
    )
    assert (alone.path, many.path) == (Path.LOCAL, Path.REMOTE)
    assert many.chosen.inflicted_ms == 0.0


def test_what_waits_in_the_frontend_says_nothing_where_there_is_one_path() -> None:
    pool = (worker("a"), worker("b", overlap_blocks=10, prefill_tokens=200))
    assert decide(Query(1000, waiting_for_decode=9.0), *pool) == msgspec.structs.replace(
        decide(Query(1000), *pool), query=Query(1000, waiting_for_decode=9.0)
    )


def test_the_prefill_worker_with_the_prefix_is_used() -> None:
    pool = (
        worker("p1", Role.PREFILL),
        worker("p2", Role.PREFILL, overlap_blocks=60),
        worker("d", Role.DECODE),
    )
    assert decide(Query(1000), *pool).prefill == "p2"


def test_missing_blocks_decide_between_decode_workers() -> None:
    rates = Rates(1.0, 0.15, 0.3, 3.0, transfer_block_ms=2.0)
    pool = (
        worker("p", Role.PREFILL, overlap_blocks=60, rates=rates),
        worker("d1", Role.DECODE, rates=rates),
        worker("d2", Role.DECODE, overlap_blocks=20, rates=rates),
    )
    decision = decide(Query(1000), *pool)
    assert (decision.path, decision.decode) == (Path.REMOTE, "d2")


def test_modes() -> None:
    assert decide(Query(5), *PD, disagg="always").path is Path.REMOTE
    assert decide(Query(4000), *PD, disagg="never").path is Path.LOCAL
    assert decide(Query(4000), PD[1], disagg="always").path is Path.LOCAL, "nobody to go first"


def test_aggregated_workers_compete_for_the_whole() -> None:
    assert decide(Query(4000), worker("p", Role.PREFILL), worker("a")).path is Path.AGGREGATED
    decision = decide(Query(4000), *PD, worker("a", overlap_blocks=249))
    assert (decision.path, decision.decode, decision.prefill) == (Path.AGGREGATED, "a", None)
    assert decide(Query(4000), *PD, worker("a", running=20)).decode == "d"


def test_a_handed_over_prompt_needs_only_a_place_to_decode() -> None:
    pool = (*PD, worker("d2", Role.DECODE, prefill_tokens=5000), worker("d3", Role.DECODE, running=9))
    decision = decide(Query(4000, handed=ANY), *pool, disagg="never")
    assert (decision.path, decision.decode, decision.prefill) == (Path.REMOTE, "d", None)


# --- workers that do not read each other's KV -------------------------------------------------------

OLD, NEW, OTHER = KvFormat(16, "l", "tcp"), KvFormat(32, "l", "tcp"), KvFormat(16, "other", "tcp")


def generation(kv_format: KvFormat, name: str, **options: Any) -> tuple[Candidate, Candidate]:
    return (
        worker(f"p-{name}", Role.PREFILL, kv_format=kv_format),
        worker(f"d-{name}", Role.DECODE, kv_format=kv_format, **options),
    )


BOTH = (*generation(OLD, "old"), *generation(NEW, "new"))
OLD_P, OLD_D, NEW_P, NEW_D = BOTH
BUSY: dict[str, Any] = {"running": 50, "prefill_tokens": 50_000}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("disagg", ["auto", "always"])
@pytest.mark.parametrize("new", [NEW, OTHER, KvFormat(16, "l", "nixl")])
def test_two_generations_serve_side_by_side_each_with_its_own(
    policy: str, disagg: str, new: KvFormat
) -> None:
    pool = (*generation(OLD, "old"), *generation(new, "new"))
    pairs = set()
    for number in range(40):
        query = Query(1000, ordinal=number)
        decision = choose(query, pool, policy=policy, disagg=disagg, rng=Random(number))
        assert decision is not None
        pairs.add((decision.prefill, decision.decode))
    assert pairs == {("p-old", "d-old"), ("p-new", "d-new")}


@pytest.mark.parametrize(
    ("pool", "path", "prefill", "decode"),
    [
        ([OLD_P, OLD_D, NEW_D], Path.REMOTE, "p-old", "d-old"),  # its prompts cost the new one more
        ([OLD_P, *generation(OLD, "old", **BUSY)[1:], NEW_D], Path.LOCAL, None, "d-new"),
        ([NEW_P, OLD_P, OLD_D], Path.REMOTE, "p-old", "d-old"),
        ([NEW_P, OLD_D], Path.LOCAL, None, "d-old"),  # nobody reads what the new one would compute
        ([NEW_P, worker("a")], Path.AGGREGATED, None, "a"),
    ],
)
@pytest.mark.parametrize("disagg", ["auto", "always"])
def test_pairs_are_chosen_among_those_whose_kv_fits(
    pool: list[Candidate], path: Path, prefill: str | None, decode: str, disagg: str
) -> None:
    decision = decide(Query(1000), *pool, disagg=disagg)
    assert (decision.path, decision.prefill, decision.decode) == (path, prefill, decode)


@pytest.mark.parametrize(
    ("handed", "pool", "path", "prefill", "decode"),
    [
        (OLD, [OLD_D, NEW_D], Path.REMOTE, None, "d-old"),
        (NEW, [OLD_D, NEW_D], Path.REMOTE, None, "d-new"),
        (OLD, [*generation(OLD, "old", **BUSY)[1:], NEW_D, NEW_P], Path.REMOTE, None, "d-old"),
        (OLD, [NEW_D], Path.LOCAL, None, "d-new"),
        (OLD, [NEW_D, NEW_P], Path.REMOTE, "p-new", "d-new"),  # prefilled once more
        (OLD, [worker("a")], Path.AGGREGATED, None, "a"),
    ],
)
def test_a_held_prompt_goes_where_its_kv_is_read_if_there_is_such_a_worker(
    handed: KvFormat, pool: list[Candidate], path: Path, prefill: str | None, decode: str
) -> None:
    decision = decide(Query(1000, handed=handed), *pool)
    assert (decision.path, decision.prefill, decision.decode) == (path, prefill, decode)


def test_nobody_waits_for_the_one_worker_that_reads_held_kv() -> None:
    """The wait that is reported is the least of all: others must not queue up behind this request."""
    (busy,) = generation(OLD, "old", **BUSY)[1:]
    decision = decide(Query(1000, handed=OLD), busy, NEW_D)
    assert decision.decode == "d-old"
    assert decision.wait_ms == 0.0


# --- the other policies -----------------------------------------------------------------------------


def test_round_robin_goes_around_both_pools() -> None:
    pool = [worker(f"{role[0]}{number}", Role(role)) for role in ("prefill", "decode") for number in (0, 1)]
    taken = [decide(Query(500, ordinal), *pool, policy="round-robin") for ordinal in range(4)]
    assert [decision.decode for decision in taken] == ["d0", "d1", "d0", "d1"]
    assert [decision.prefill for decision in taken] == ["p0", "p1", "p0", "p1"]


def test_least_loaded() -> None:
    pool = (worker("a", running=3), worker("b", waiting=1), worker("c", waiting=1, prefill_tokens=9))
    assert decide(Query(500), *pool, policy="least-loaded").decode == "b"


def test_power_of_two_never_takes_the_most_loaded() -> None:
    pool = [worker(f"w{number}", running=number) for number in range(5)]
    rng = Random(0)
    taken = {
        decision.decode
        for _ in range(200)
        if (decision := choose(Query(5), pool, policy="power-of-two", rng=rng))
    }
    assert taken == {"w0", "w1", "w2", "w3"}


FORMATS = st.sampled_from([OLD, NEW])
WORKERS = st.lists(
    st.tuples(
        st.sampled_from(Role),
        st.integers(0, 300),  # overlap_blocks
        st.integers(0, 64),  # running
        st.integers(0, 64),  # waiting
        st.integers(0, 100_000),  # prefill_tokens
        st.integers(0, 1000),  # used_blocks
        FORMATS,
    ),
    max_size=6,
)


@given(
    WORKERS,
    st.integers(1, 5000),
    st.sampled_from(sorted(POLICIES)),
    st.sampled_from(Disagg),
    st.none() | FORMATS,
    st.integers(0, 2**32),
)
def test_every_decision_can_be_carried_out(
    workers: list[tuple[Role, int, int, int, int, int, KvFormat]],
    tokens: int,
    policy: str,
    disagg: Disagg,
    handed: KvFormat | None,
    seed: int,
) -> None:
    pool = [
        worker(
            f"w{number}",
            role,
            overlap_blocks=overlap,
            running=running,
            waiting=waiting,
            prefill_tokens=prefill_tokens,
            used_blocks=used,
            kv_format=kv_format,
        )
        for number, (role, overlap, running, waiting, prefill_tokens, used, kv_format) in enumerate(workers)
    ]
    roles = {candidate.instance_id: candidate.role for candidate in pool}
    formats = {candidate.instance_id: candidate.kv_format for candidate in pool}
    query = Query(tokens, ordinal=seed, handed=handed)
    decision = choose(query, pool, policy=policy, disagg=disagg, rng=Random(seed))
    again = choose(query, pool, policy=policy, disagg=disagg, rng=Random(seed))
    assert decision == again
    if decision is None:
        assert Role.DECODE not in roles.values()
        assert Role.AGGREGATED not in roles.values()
        return
    assert roles[decision.decode].decodes
    assert (decision.path is Path.AGGREGATED) <= (roles[decision.decode] is Role.AGGREGATED)
    if decision.prefill is not None:
        assert roles[decision.prefill] is Role.PREFILL
        assert decision.path is Path.REMOTE
        assert formats[decision.prefill] == formats[decision.decode]
    elif decision.path is Path.REMOTE:
        assert formats[decision.decode] == handed
    else:
        assert handed not in [formats[name] for name, role in roles.items() if role.decodes]
    for plan in decision.plans:
        counted = plan_costs_ms(plan)
        assert min(counted.values()) >= 0.0
        assert plan.total_ms == pytest.approx(sum(counted.values()))
        assert plan.here.uncached_tokens >= 1


@pytest.mark.parametrize("policy", POLICIES)
def test_the_wait_is_the_least_of_all_whoever_is_drawn(policy: str) -> None:
    """Otherwise a request that a policy drew a busy worker for would be sent away beside idle ones."""
    busy = [worker(name, prefill_tokens=100_000) for name in ("a", "b")]
    decisions = [
        decide(Query(100, ordinal=ordinal), *busy, worker("idle"), policy=policy) for ordinal in range(3)
    ]
    assert [decision.wait_ms for decision in decisions] == [0.0, 0.0, 0.0]
