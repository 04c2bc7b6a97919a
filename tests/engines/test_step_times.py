"""What a step costs is found from noisy steps, and a machine that changes is believed soon.

Accuracy is that of predictions, for the kinds of steps that were seen: coefficients alone say little where
the mix of work cannot tell them apart.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import hypothesis.strategies as st
import pytest
from hypothesis import given

from penstock.engines.step_times import Fit, StepTimes, StepWork
from penstock.shapes import Rates

QWEN3_32B = Rates(step_ms=10.8, prefill_token_ms=0.0464, decode_request_ms=0.3)
NUMPY_TINY = Rates(step_ms=1.0, prefill_token_ms=0.15, decode_request_ms=0.3)
SLOW = Rates(step_ms=30.0, prefill_token_ms=2.0, decode_request_ms=4.0)

Step = tuple[int, int]
"""Prefill tokens and decoding requests."""

Mix = Callable[[random.Random], Step]
Machine = Callable[[random.Random, float], float]
"""How long it takes for what should take so many ms."""


# --- what steps do ------------------------------------------------------------------------------------


def mixed(rng: random.Random) -> Step:
    return rng.randint(1, 2048) if rng.random() < 0.3 else 0, rng.randint(1, 40)


def only_decode(rng: random.Random) -> Step:
    return 0, rng.randint(1, 12)


def always_eight(rng: random.Random) -> Step:
    return 0, 8


def only_prefill(rng: random.Random) -> Step:
    return rng.randint(60, 1450), 0


def tiny_batches(rng: random.Random) -> Step:
    return rng.randint(1, 8) if rng.random() < 0.2 else 0, rng.randint(1, 3)


def rarely_a_prompt(rng: random.Random) -> Step:
    return rng.randint(60, 1450) if rng.random() < 0.02 else 0, rng.randint(1, 12)


SEEN: dict[Mix, list[Step]] = {
    mixed: [(0, 1), (0, 8), (0, 40), (1000, 8)],
    only_decode: [(0, 1), (0, 4), (0, 12)],
    always_eight: [(0, 8)],
    only_prefill: [(200, 0), (500, 0), (1450, 0)],
    tiny_batches: [(0, 1), (0, 3), (8, 2)],
    rarely_a_prompt: [(0, 1), (0, 8), (500, 8)],
}


# --- how long they take -------------------------------------------------------------------------------


def exact(rng: random.Random, ms: float) -> float:
    return ms


def noisy(rng: random.Random, ms: float, sigma: float = 0.1) -> float:
    return ms * rng.lognormvariate(-sigma * sigma / 2, sigma)


def stalling(every: int, stall_ms: float) -> Machine:
    """It stands still at every such step."""
    count = 0

    def run(rng: random.Random, ms: float) -> float:
        nonlocal count
        count += 1
        return noisy(rng, ms) + (stall_ms if count % every == 0 else 0.0)

    return run


def tenth_of_a_core(period_ms: float = 100.0, share: float = 0.1) -> Machine:
    """A container's quota: it runs until its part of the period is used up, and then stands still."""
    left = period_ms * share

    def run(rng: random.Random, ms: float) -> float:
        nonlocal left
        ms, waited = noisy(rng, ms), 0.0
        took = ms
        while ms > left:
            ms -= left
            waited += period_ms * (1.0 - share)
            left = period_ms * share
        left -= ms
        return took + waited

    return run


# --- helpers ------------------------------------------------------------------------------------------


def scaled(rates: Rates, factor: float) -> Rates:
    return Rates(rates.step_ms * factor, rates.prefill_token_ms * factor, rates.decode_request_ms * factor)


def work(step: Step) -> StepWork:
    return StepWork(prefill_tokens=step[0], decode_requests=step[1])


def step_ms(rates: Rates, step: Step) -> float:
    return rates.step_ms + rates.prefill_token_ms * step[0] + rates.decode_request_ms * step[1]


def feed(
    times: StepTimes, rates: Rates, steps: int, mix: Mix = mixed, machine: Machine = noisy, seed: int = 0
) -> None:
    rng = random.Random(seed)
    for _ in range(steps):
        step = mix(rng)
        times.observe(work(step), machine(rng, step_ms(rates, step)))


def assert_predicts(times: StepTimes, true: Rates, steps: list[Step], share: float) -> None:
    for step in steps:
        assert step_ms(times.rates(), step) == pytest.approx(step_ms(true, step), rel=share), step


def assert_close(rates: Rates, true: Rates, share: float) -> None:
    for name in ("step_ms", "prefill_token_ms", "decode_request_ms"):
        assert getattr(rates, name) == pytest.approx(getattr(true, name), rel=share), name


def warm(rates: Rates, mix: Mix = mixed) -> StepTimes:
    times = StepTimes()
    feed(times, rates, 600, mix)
    return times


EVERY_MIX = pytest.mark.parametrize("mix", list(SEEN), ids=lambda mix: mix.__name__)
EVERY_MACHINE = pytest.mark.parametrize("true", [QWEN3_32B, NUMPY_TINY, SLOW])


# --- a machine that stays as it is --------------------------------------------------------------------


def test_before_any_step_the_prior_holds() -> None:
    assert StepTimes().rates() == Rates()
    assert StepTimes(SLOW).rates() == SLOW


@EVERY_MACHINE
def test_rates_converge_from_the_default_prior(true: Rates) -> None:
    times = StepTimes()
    feed(times, true, 600)
    assert_close(times.rates(), true, 0.15)


def test_exact_steps_give_exact_rates() -> None:
    times = StepTimes()
    feed(times, NUMPY_TINY, 600, machine=exact)
    assert_close(times.rates(), NUMPY_TINY, 0.01)


@EVERY_MACHINE
@EVERY_MIX
def test_100_steps_are_enough_to_predict_the_next(mix: Mix, true: Rates) -> None:
    times = StepTimes()
    feed(times, true, 100, mix)
    seen = [step for step in SEEN[mix] if mix is not rarely_a_prompt or not step[0]]
    assert_predicts(times, true, seen, 0.25)


@EVERY_MIX
def test_heavy_noise_is_averaged(mix: Mix) -> None:
    times = StepTimes()
    feed(times, NUMPY_TINY, 1000, mix, lambda rng, ms: noisy(rng, ms, 0.4))
    assert_predicts(times, NUMPY_TINY, SEEN[mix], 0.2)


@pytest.mark.parametrize("prior", [Rates(), SLOW])
def test_what_comes_rarely_is_learned_however_wrong_the_prior(prior: Rates) -> None:
    times = StepTimes(prior)
    feed(times, NUMPY_TINY, 1500, rarely_a_prompt)
    assert_predicts(times, NUMPY_TINY, SEEN[rarely_a_prompt], 0.15)


def test_what_is_not_exercised_stays_as_it_was() -> None:
    times = warm(NUMPY_TINY)
    feed(times, NUMPY_TINY, 5_000, only_decode, seed=1)
    assert_close(times.rates(), NUMPY_TINY, 0.2)


@EVERY_MACHINE
def test_what_was_never_exercised_keeps_its_prior(true: Rates) -> None:
    """A GPU that has only decoded is not taken for one that computes prompts as slowly as a CPU."""
    times = StepTimes()
    feed(times, true, 600, only_decode)
    assert times.rates().prefill_token_ms == pytest.approx(Rates().prefill_token_ms, rel=0.1)


# --- stalls -------------------------------------------------------------------------------------------


@EVERY_MIX
def test_one_stall_changes_almost_nothing(mix: Mix) -> None:
    times = warm(NUMPY_TINY, mix)
    before = times.rates()
    times.observe(work(mix(random.Random(5))), 2_000.0)
    feed(times, NUMPY_TINY, 15, mix, seed=1)
    assert_predicts(times, before, SEEN[mix], 0.05)


def test_two_stalls_at_once_change_little() -> None:
    times = warm(NUMPY_TINY)
    before = times.rates()
    times.observe(work((0, 10)), 2_000.0)
    times.observe(work((0, 12)), 1_500.0)
    for seed in range(8):
        feed(times, NUMPY_TINY, 8, seed=seed)
        assert_predicts(times, before, SEEN[mixed], 0.15)


def test_rare_stalls_do_not_count() -> None:
    times = StepTimes()
    feed(times, NUMPY_TINY, 1_000, machine=stalling(every=50, stall_ms=2_000.0))
    assert_close(times.rates(), NUMPY_TINY, 0.2)


def test_frequent_stalls_are_part_of_what_a_step_takes() -> None:
    times = warm(NUMPY_TINY, only_decode)
    feed(times, NUMPY_TINY, 600, only_decode, stalling(every=6, stall_ms=90.0), seed=1)
    true = NUMPY_TINY.step_ms + 90.0 / 6
    assert_predicts(times, Rates(true, 0.0, NUMPY_TINY.decode_request_ms), SEEN[only_decode], 0.3)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("mix", [only_decode, always_eight, tiny_batches], ids=lambda mix: mix.__name__)
def test_a_tenth_of_a_core_is_ten_times_slower_also_for_one_request(mix: Mix, seed: int) -> None:
    """Steps are short beside the quota's period: most run at full speed, and some stand still for 90 ms."""
    rates = Rates(1.5, 0.26, 0.06)
    times = warm(rates, mix)
    machine = tenth_of_a_core()
    feed(times, rates, 200, mix, machine, seed)
    for _ in range(5):
        feed(times, rates, 200, mix, machine, seed + 1)
        assert_predicts(times, scaled(rates, 10), [(0, 1)], 0.5)
        assert_predicts(times, scaled(rates, 10), SEEN[mix][1:], 0.3)


@pytest.mark.parametrize("seed", range(6))
def test_one_request_is_not_free_on_a_worker_that_began_with_a_tenth_of_a_core(seed: int) -> None:
    rates = Rates(1.5, 0.26, 0.06)
    times = StepTimes()
    feed(times, rates, 600, only_decode, tenth_of_a_core(), seed)
    assert_predicts(times, scaled(rates, 10), [(0, 1)], 0.6)
    assert_predicts(times, scaled(rates, 10), [(0, 4), (0, 8)], 0.3)


# --- a machine that changes ---------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [10.0, 4.0, 0.25, 0.1])
@pytest.mark.parametrize("offset", range(0, 8, 3))  # of the change within a block
@EVERY_MIX
def test_a_lasting_change_is_believed_within_24_steps(mix: Mix, offset: int, factor: float) -> None:
    times = warm(NUMPY_TINY)
    feed(times, NUMPY_TINY, offset, mix, seed=2)
    feed(times, scaled(NUMPY_TINY, factor), 24, mix, seed=3)
    assert_predicts(times, scaled(NUMPY_TINY, factor), SEEN[mix], 0.3)


@pytest.mark.parametrize("mix", [only_decode, always_eight, only_prefill], ids=lambda mix: mix.__name__)
def test_a_change_seen_in_one_kind_of_work_holds_for_the_others(mix: Mix) -> None:
    times = warm(NUMPY_TINY)
    feed(times, scaled(NUMPY_TINY, 10), 24, mix, seed=1)
    assert_close(times.rates(), scaled(NUMPY_TINY, 10), 0.3)


def test_a_change_of_two_is_followed_in_time() -> None:
    times = warm(NUMPY_TINY)
    feed(times, scaled(NUMPY_TINY, 2), 1_000, seed=1)
    assert_predicts(times, scaled(NUMPY_TINY, 2), SEEN[mixed], 0.2)


def test_a_change_of_slow_steps_is_believed_within_12() -> None:
    """Which are seconds as they are: 300 ms before, and 3 s since."""
    times = StepTimes()
    feed(times, SLOW, 100, only_prefill)
    feed(times, scaled(SLOW, 10), 12, only_prefill, seed=1)
    assert_predicts(times, scaled(SLOW, 10), SEEN[only_prefill], 0.3)


def test_no_part_of_a_step_is_ever_free() -> None:
    """Prompts alone tell nothing of what a single decode step takes, whatever chance says."""
    for seed in range(20):
        times = StepTimes()
        feed(times, NUMPY_TINY, 200, only_prefill, lambda rng, ms: noisy(rng, ms, 0.3), seed)
        assert times.rates().step_ms >= 0.1


def test_a_change_back_is_believed_as_soon() -> None:
    times = warm(NUMPY_TINY)
    for factor in (10.0, 1.0, 0.1, 1.0, 10.0, 1.0):
        feed(times, scaled(NUMPY_TINY, factor), 40, seed=int(factor * 10))
        assert_predicts(times, scaled(NUMPY_TINY, factor), SEEN[mixed], 0.3)


def test_a_quota_that_is_lifted_is_known_within_80_steps_and_forgotten_within_400() -> None:
    rates = Rates(1.5, 0.26, 0.06)
    times = warm(rates)
    feed(times, rates, 1_000, only_decode, tenth_of_a_core(), seed=1)
    feed(times, rates, 80, only_decode, seed=2)
    assert_predicts(times, rates, SEEN[only_decode], 1.0)
    feed(times, rates, 320, only_decode, seed=3)
    assert_predicts(times, rates, SEEN[only_decode], 0.35)


def test_a_kind_of_work_that_was_hardly_seen_says_nothing_of_the_machine() -> None:
    """The prior is wrong about decoding by far; when decoding begins, prompts keep their price."""
    gpu = Rates(step_ms=10.0, prefill_token_ms=0.05, decode_request_ms=0.3)
    times = StepTimes(Rates(step_ms=1.0, prefill_token_ms=0.05, decode_request_ms=0.01))
    feed(times, gpu, 200, lambda rng: (8192, 0))
    feed(times, gpu, 40, only_decode, seed=1)
    assert_predicts(times, gpu, [(8192, 0), *SEEN[only_decode]], 0.25)


def test_a_part_that_changes_alone_is_learned() -> None:
    times = warm(NUMPY_TINY)
    true = Rates(NUMPY_TINY.step_ms, 10 * NUMPY_TINY.prefill_token_ms, NUMPY_TINY.decode_request_ms)
    feed(times, true, 400, seed=1)
    assert_predicts(times, true, SEEN[mixed], 0.3)


# --- whatever comes -----------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.integers(0, 8192), st.integers(0, 256), st.floats(-1.0, 1e6)), min_size=1, max_size=200
    )
)
def test_rates_are_never_negative_or_absurd(steps: list[tuple[int, int, float]]) -> None:
    times = StepTimes()
    for prefill_tokens, decode_requests, ms in steps:
        times.observe(work((prefill_tokens, decode_requests)), ms)
        times.observe_transfer(prefill_tokens, ms)
    rates = times.rates()
    for name in rates.__struct_fields__:
        assert 0.0 <= getattr(rates, name) <= 1e7


def rough_life(rng: random.Random) -> Iterator[tuple[Step, float]]:
    """A worker whose speed changes by powers of ten at random moments."""
    while True:
        mix, factor = rng.choice(list(SEEN)), 10.0 ** rng.randint(-2, 2)
        machine = rng.choice([exact, noisy, tenth_of_a_core(), stalling(7, 500.0)])
        for _ in range(rng.randint(1, 300)):
            step = mix(rng)
            yield step, machine(rng, factor * step_ms(NUMPY_TINY, step))


@pytest.mark.parametrize("seed", range(20))
def test_a_rough_life_leaves_the_fit_usable(seed: int) -> None:
    times = StepTimes()
    life = rough_life(random.Random(seed))
    for _ in range(4_000):
        step, ms = next(life)
        times.observe(work(step), ms)
    feed(times, QWEN3_32B, 1_000, seed=1)
    assert_predicts(times, QWEN3_32B, SEEN[mixed], 0.3)


# --- pulls --------------------------------------------------------------------------------------------


def test_transfers_are_measured_apart() -> None:
    times = StepTimes()
    rng = random.Random(0)
    for _ in range(300):
        blocks = rng.randint(0, 500)
        times.observe_transfer(blocks, (2.0 + 0.02 * blocks) * rng.lognormvariate(0.0, 0.1))
    rates = times.rates()
    assert rates.transfer_ms == pytest.approx(2.0, rel=0.15)
    assert rates.transfer_block_ms == pytest.approx(0.02, rel=0.15)
    assert rates.step_ms == Rates().step_ms


def test_a_network_that_slows_down_is_believed_within_24_pulls() -> None:
    fit = Fit((2.0, 0.05), (0.0, 0.0))
    rng = random.Random(0)
    for number in range(324):
        blocks = rng.randint(1, 500)
        fit.observe((1.0, blocks), (2.0 + 0.02 * blocks) * (10.0 if number >= 300 else 1.0))
    assert fit.coefficients == pytest.approx([20.0, 0.2], rel=0.1)
