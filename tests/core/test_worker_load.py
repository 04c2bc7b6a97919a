"""A worker's load counts what no report of it includes yet."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from penstock.core.prompt_work import PromptWork, prompt_work
from penstock.core.worker_load import StepUnderWay, WorkerLoad
from penstock.shapes import Load


def test_what_was_sent_counts_until_a_report_includes_it() -> None:
    worker = WorkerLoad()
    assert worker.assumed() == Load()
    reported = Load(running=3, waiting=1, prefill_tokens=100, context_tokens=1000)
    worker.report(0, reported, 0.0)
    worker.send(1, 40, 200, 0.0, 0.0)
    worker.send(2, 60, 300, 0.0, 0.0)
    load = worker.assumed()
    assert (load.running, load.waiting, load.prefill_tokens, load.context_tokens) == (3, 3, 200, 1500)
    assert load.prefill_context_tokens == 40 * (160 + 20) + 60 * (240 + 30)
    assert worker.reported == reported
    worker.report(1, reported, 0.0)
    load = worker.assumed()
    assert (load.waiting, load.prefill_tokens, load.context_tokens) == (2, 160, 1300)
    assert load.prefill_context_tokens == 60 * (240 + 30)
    worker.report(2, reported, 0.0)
    assert worker.assumed() is reported


def test_a_booking_counts_as_waiting_until_released() -> None:
    worker = WorkerLoad()
    worker.book("r1", 500)
    worker.book("r1", 600)
    load = worker.assumed()
    assert (load.waiting, load.context_tokens, load.prefill_tokens) == (1, 600, 0)
    worker.release("r1")
    worker.release("r1")
    assert worker.assumed() == Load()


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 50)), max_size=50))
def test_the_assumed_load_is_the_report_plus_what_it_has_not_seen(events: list[tuple[bool, int]]) -> None:
    worker = WorkerLoad()
    sent: list[int] = []
    seen = 0
    for is_sent, amount in events:
        if is_sent:
            sent.append(amount)
            worker.send(len(sent), amount, 2 * amount, 0.0, 0.0)
        else:
            seen = min(len(sent), seen + amount)
            worker.report(seen, Load(waiting=7), 0.0)
    load = worker.assumed()
    missing = sent[seen:]
    assert load.prefill_tokens == sum(missing)
    assert load.context_tokens == 2 * sum(missing)
    assert load.prefill_context_tokens == sum(3 * amount * amount // 2 for amount in missing)
    assert load.waiting == len(missing) + (7 if any(not is_sent for is_sent, _ in events) else 0)


def test_the_attempts_of_an_instance_are_those_reported_and_those_on_their_way() -> None:
    worker = WorkerLoad()
    for seq in (1, 2):
        worker.send(seq, 100, 100, 0.0, 0.0)
    worker.book("r", 50)  # promised, and not sent
    assert worker.requests == 2
    worker.report(1, Load(running=3, waiting=4), 0.0)
    assert worker.requests == 8


def test_a_step_begins_with_a_report_of_another_one_and_takes_up_what_is_on_its_way() -> None:
    worker = WorkerLoad()
    assert worker.step(64, 5.0) is None, "it has nothing to do"
    worker.send(1, 100, 100, 0.0, 10.0)
    worker.send(2, 40, 40, 0.0, 10.1)
    assert worker.step(200, 10.25) == StepUnderWay(pytest.approx(250.0), prompt_work(0, 100))
    worker.report(1, Load(running=1, prefill_tokens=100, prefill_context_tokens=5000), 10.3)
    assert worker.step(200, 10.3) == StepUnderWay(pytest.approx(300.0), prompt_work(0, 100)), "the same one"
    worker.report(1, Load(running=1, prefill_tokens=60, prefill_context_tokens=7, steps=1), 10.5)
    assert worker.step(200, 10.6) == StepUnderWay(pytest.approx(100.0), PromptWork(100, 807))
    assert worker.step(50, 10.6) == StepUnderWay(pytest.approx(100.0), PromptWork(50, 403))
    worker.report(2, Load(steps=9), 11.0)
    assert worker.step(200, 11.0) is None
