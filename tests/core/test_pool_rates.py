"""Equal workers are taken for equally fast; one that is slower indeed is not."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from penstock.core.pool_rates import MEASURED_ATTEMPTS, REPORTS, PoolRates
from penstock.core.worker_load import WorkerLoad
from penstock.shapes import Load, Rates, Role
from tests.cards import card

TRUE = Rates(10.0, 0.05, 0.1, prefill_context_ms=2e-6, decode_context_ms=3e-5)


class Pool:
    """Workers that report their rates."""

    def __init__(self, *rates: Rates, role: Role = Role.AGGREGATED) -> None:
        self.rates = PoolRates()
        self.loads: dict[str, WorkerLoad] = {}
        for number, own in enumerate(rates):
            self.up(f"w{number}", own, role)

    def up(
        self, name: str, own: Rates, role: Role = Role.AGGREGATED, submitted: int = MEASURED_ATTEMPTS
    ) -> None:
        self.loads[name] = WorkerLoad(
            Load(running=8, context_tokens=20_000, rates=own, submitted=submitted),
            prompt_tokens=500.0,
            prompt_context_tokens=125_000.0,
        )
        self.rates.up(card(name, role), self.loads[name])

    def report(self, *names: str, times: int = 1) -> None:
        for _ in range(times):
            for name in names or tuple(self.loads):
                load = self.loads[name]
                load.report(0, load.reported, 0.0)
                self.rates.reported(name)

    def used(self, name: str) -> Rates:
        return self.loads[name].assumed().rates


SHORT_PROMPTS = replace(TRUE, prefill_token_ms=0.02, prefill_context_ms=1.2e-4)
"""As good as TRUE for prompts of 500 tokens, and three times as slow for those of 1,000 and more."""


def test_equal_workers_with_different_fits_are_taken_for_equally_fast() -> None:
    slower = replace(TRUE, step_ms=11.0, decode_request_ms=0.12)
    faster = replace(TRUE, step_ms=9.5, decode_request_ms=0.05)
    pool = Pool(slower, TRUE, faster)
    pool.report()
    assert [pool.used(name) for name in pool.loads] == [TRUE, TRUE, TRUE]


def test_a_worker_that_only_had_short_prompts_is_taken_to_compute_long_ones_as_fast_as_the_others() -> None:
    pool = Pool(TRUE, TRUE, SHORT_PROMPTS)
    pool.report()
    assert pool.used("w2").prefill_context_ms == TRUE.prefill_context_ms


def test_a_worker_that_is_twice_as_slow_is_taken_for_that() -> None:
    slow = replace(TRUE, step_ms=20.0, decode_request_ms=0.2, decode_context_ms=6e-5, prefill_token_ms=0.1)
    pool = Pool(TRUE, TRUE, slow)
    pool.report()
    assert pool.used("w0") == TRUE
    assert pool.used("w2").step_ms == pytest.approx(20.0)
    assert pool.used("w2").prefill_token_ms == pytest.approx(0.1, rel=0.02)


def test_a_worker_that_becomes_slow_is_noticed_at_its_next_look() -> None:
    pool = Pool(TRUE, TRUE, TRUE)
    pool.report()
    slow = replace(TRUE, step_ms=30.0)
    pool.loads["w1"].reported = replace(pool.loads["w1"].reported, rates=slow)
    pool.report("w1", times=REPORTS)
    assert pool.used("w1").step_ms > 2 * TRUE.step_ms
    assert pool.used("w0") == TRUE


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_a_worker_that_joins_is_taken_for_as_fast_as_the_others_until_it_has_measured_itself(
    factor: float,
) -> None:
    pool = Pool(TRUE)
    pool.report()
    guess = replace(TRUE, step_ms=factor * TRUE.step_ms, prefill_token_ms=factor * TRUE.prefill_token_ms)
    for name in ("w1", "w2"):
        pool.up(name, guess, submitted=0)
        assert pool.used(name) == TRUE, "before its first report"
    pool.report(times=4 * REPORTS)
    assert [pool.used(name) for name in pool.loads] == [TRUE] * 3, "the two do not count in the medians"
    pool.loads["w2"].reported = replace(pool.loads["w2"].reported, submitted=MEASURED_ATTEMPTS)
    pool.report("w2", times=REPORTS)
    assert pool.used("w2") != TRUE


def test_once_one_has_measured_itself_the_others_are_taken_for_as_fast() -> None:
    pool = Pool()
    for name in ("w0", "w1", "w2"):
        pool.up(name, Rates(), submitted=1)
        pool.report(name)
    assert [pool.used(name) for name in pool.loads] == [Rates()] * 3
    pool.loads["w1"].reported = Load(rates=TRUE, submitted=MEASURED_ATTEMPTS)
    pool.report("w1", times=4 * REPORTS)
    assert [pool.used(name) for name in pool.loads] == [TRUE] * 3


def test_rates_of_transfers_are_a_workers_own() -> None:
    pool = Pool(TRUE, TRUE, replace(TRUE, transfer_ms=9.0, transfer_block_ms=0.5))
    pool.report()
    assert (pool.used("w2").transfer_ms, pool.used("w2").transfer_block_ms) == (9.0, 0.5)


def test_workers_of_other_roles_are_not_compared() -> None:
    pool = Pool(TRUE, TRUE)
    slow = replace(TRUE, prefill_token_ms=0.06)
    pool.up("prefill", slow, Role.PREFILL)
    pool.report()
    assert pool.used("prefill") == slow


def test_a_worker_that_has_measured_nothing_is_taken_for_as_fast_as_those_of_another_role() -> None:
    pool = Pool()
    pool.up("decode", TRUE, Role.DECODE, submitted=3)
    pool.up("prefill", Rates(), Role.PREFILL, submitted=0)
    pool.report("decode")
    used = pool.used("prefill")
    assert (used.step_ms, used.prefill_token_ms, used.prefill_context_ms) == (10.0, 0.05, 2e-6)
    assert used.decode_request_ms == Rates().decode_request_ms, "it never decodes"
    pool.up("late", Rates(), Role.PREFILL, submitted=0)
    assert pool.used("late").prefill_token_ms == 0.05, "before its first report"
    own = replace(Rates(), step_ms=20.0, prefill_token_ms=0.2, prefill_context_ms=4e-6)
    pool.loads["prefill"].reported = replace(pool.loads["prefill"].reported, rates=own, submitted=8)
    pool.report("prefill")
    assert pool.used("prefill") == own, "other machines may have other roles"


def test_a_decode_worker_that_computed_no_prompts_is_taken_to_do_so_as_fast_as_prefill_workers() -> None:
    pool = Pool(TRUE, role=Role.PREFILL)
    one_token_each = replace(Rates(), step_ms=9.0, prefill_token_ms=0.0201)
    pool.up("decode", one_token_each, Role.DECODE)
    pool.report()
    pool.report("decode", times=2 * REPORTS)
    used = pool.used("decode")
    assert (used.step_ms, used.prefill_token_ms, used.prefill_context_ms) == (9.0, 0.05, 2e-6)


def test_workers_of_other_models_are_not_compared() -> None:
    pool = Pool(TRUE, TRUE)
    other = card("other", Role.PREFILL, model="other")
    pool.loads["other"] = WorkerLoad(Load())
    pool.rates.up(other, pool.loads["other"])
    pool.report()
    assert pool.used("other") == Rates()


def test_a_worker_that_is_gone_does_not_count() -> None:
    slow = replace(TRUE, step_ms=12.0)
    pool = Pool(TRUE, TRUE, slow)
    for name in ("w0", "w1"):
        pool.rates.down(name)
    pool.report("w2", times=2 * REPORTS)
    assert pool.used("w2") == slow


def test_a_single_worker_goes_by_its_own_rates() -> None:
    pool = Pool(SHORT_PROMPTS)
    pool.report()
    assert pool.used("w0") == SHORT_PROMPTS
