"""Rates are found from noisy steps, and load counts what no report includes yet."""

import random

import hypothesis.strategies as st
import pytest
from hypothesis import given

from penstock.core.load import LoadBook, StepTimes
from penstock.structs import Load, Rates

QWEN3_32B = Rates(step_ms=10.8, prefill_token_ms=0.0464, decode_request_ms=0.3)
NUMPY_TINY = Rates(step_ms=1.0, prefill_token_ms=0.15, decode_request_ms=0.3)
SLOW = Rates(step_ms=30.0, prefill_token_ms=2.0, decode_request_ms=4.0)


def feed(
    times: StepTimes,
    true: Rates,
    steps: int,
    *,
    noise: float = 0.1,
    pause_every: int = 0,
    prefill: bool = True,
    decoding: tuple[int, int] = (0, 40),
    seed: int = 0,
) -> None:
    """Observe `steps` steps of a worker with the true rates; times vary by `noise` (log-normal sigma)."""
    rng = random.Random(seed)
    for step in range(1, steps + 1):
        decode = rng.randint(*decoding)
        tokens = rng.randint(1, 2048) if prefill and rng.random() < 0.3 else 0
        ms = true.step_ms + true.prefill_token_ms * tokens + true.decode_request_ms * decode
        ms *= rng.lognormvariate(0.0, noise)
        if pause_every and step % pause_every == 0:
            ms += 2_000.0
        times.observe(tokens, decode, ms)


def assert_close(rates: Rates, true: Rates, share: float) -> None:
    for name in ("step_ms", "prefill_token_ms", "decode_request_ms"):
        assert getattr(rates, name) == pytest.approx(getattr(true, name), rel=share), name


@pytest.mark.parametrize("true", [QWEN3_32B, NUMPY_TINY, SLOW])
def test_rates_converge_from_the_default_prior(true: Rates) -> None:
    times = StepTimes()
    feed(times, true, 600)
    assert_close(times.rates(), true, 0.15)


def test_exact_steps_give_exact_rates() -> None:
    times = StepTimes()
    feed(times, NUMPY_TINY, 600, noise=0.0)
    assert_close(times.rates(), NUMPY_TINY, 0.01)


def test_64_steps_are_enough_to_route_by() -> None:
    times = StepTimes()
    feed(times, NUMPY_TINY, 64)
    assert_close(times.rates(), NUMPY_TINY, 0.25)


def test_before_any_step_the_prior_holds() -> None:
    assert StepTimes().rates() == Rates()
    assert StepTimes(SLOW).rates() == SLOW


def test_one_pause_of_the_process_changes_almost_nothing() -> None:
    times = StepTimes()
    feed(times, NUMPY_TINY, 400)
    before = times.rates()
    times.observe(0, 10, 2_000.0)
    feed(times, NUMPY_TINY, 15, seed=1)
    assert_close(times.rates(), before, 0.05)


def test_regular_pauses_do_not_poison_the_rates() -> None:
    times = StepTimes()
    feed(times, NUMPY_TINY, 1_000, pause_every=50)
    assert_close(times.rates(), NUMPY_TINY, 0.15)


def test_what_is_not_exercised_stays_as_it_was() -> None:
    times = StepTimes()
    feed(times, NUMPY_TINY, 600)
    feed(times, NUMPY_TINY, 5_000, prefill=False, decoding=(1, 40), seed=1)
    assert_close(times.rates(), NUMPY_TINY, 0.2)


def test_a_constant_mix_still_predicts_its_step() -> None:
    """With always 8 requests, step_ms and decode_request_ms cannot be told apart; their sum can."""
    times = StepTimes()
    feed(times, NUMPY_TINY, 600, prefill=False, decoding=(8, 8))
    rates = times.rates()
    assert rates.step_ms + 8 * rates.decode_request_ms == pytest.approx(1.0 + 8 * 0.3, rel=0.1)


def test_a_lasting_change_is_followed() -> None:
    times = StepTimes()
    feed(times, NUMPY_TINY, 600)
    slower = Rates(step_ms=10.0, prefill_token_ms=1.5, decode_request_ms=3.0)
    feed(times, slower, 400, seed=1)
    assert_close(times.rates(), slower, 0.3)


@given(
    st.lists(
        st.tuples(st.integers(0, 8192), st.integers(0, 256), st.floats(-1.0, 1e6)), min_size=1, max_size=60
    )
)
def test_rates_are_never_negative_or_absurd(steps: list[tuple[int, int, float]]) -> None:
    times = StepTimes()
    for prefill_tokens, decode_requests, ms in steps:
        times.observe(prefill_tokens, decode_requests, ms)
        times.observe_transfer(prefill_tokens, ms)
    rates = times.rates()
    for name in rates.__struct_fields__:
        assert 0.0 <= getattr(rates, name) <= 1e7


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


# --- LoadBook -------------------------------------------------------------------------------------


def test_an_unknown_instance_is_idle() -> None:
    book = LoadBook()
    assert book.view("w") == Load()
    assert book.reported_load("w") == Load()
    book.release("w", "r")
    book.forget("w")


def test_what_was_sent_counts_until_a_report_includes_it() -> None:
    book = LoadBook()
    reported = Load(running=3, waiting=1, prefill_tokens=100, context_tokens=1000)
    book.reported("w", 0, reported)
    book.sent("w", 1, uncached_tokens=40, context_tokens=200)
    book.sent("w", 2, uncached_tokens=60, context_tokens=300)
    view = book.view("w")
    assert (view.running, view.waiting, view.prefill_tokens, view.context_tokens) == (3, 3, 200, 1500)
    assert book.reported_load("w") == reported
    book.reported("w", 1, reported)
    view = book.view("w")
    assert (view.waiting, view.prefill_tokens, view.context_tokens) == (2, 160, 1300)
    book.reported("w", 2, reported)
    assert book.view("w") is reported


def test_a_booking_counts_as_waiting_until_released() -> None:
    book = LoadBook()
    book.book("w", "r1", 500)
    book.book("w", "r1", 600)
    view = book.view("w")
    assert (view.waiting, view.context_tokens, view.prefill_tokens) == (1, 600, 0)
    book.release("w", "r1")
    book.release("w", "r1")
    assert book.view("w") == Load()


def test_forgetting_forgets_everything() -> None:
    book = LoadBook()
    book.sent("w", 1, 10, 10)
    book.book("w", "r", 10)
    book.reported("w", 0, Load(running=5))
    book.forget("w")
    assert book.view("w") == Load()
    book.sent("w", 1, 10, 20)  # a new connection counts from 1 again
    book.reported("w", 1, Load())
    assert book.view("w") == Load()


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 50)), max_size=50))
def test_the_view_is_the_report_plus_what_it_has_not_seen(events: list[tuple[bool, int]]) -> None:
    book = LoadBook()
    sent: list[int] = []
    seen = 0
    for is_sent, amount in events:
        if is_sent:
            sent.append(amount)
            book.sent("w", len(sent), amount, 2 * amount)
        else:
            seen = min(len(sent), seen + amount)
            book.reported("w", seen, Load(waiting=7))
    view = book.view("w")
    missing = sent[seen:]
    assert view.prefill_tokens == sum(missing)
    assert view.context_tokens == 2 * sum(missing)
    assert view.waiting == len(missing) + (7 if any(not is_sent for is_sent, _ in events) else 0)
