"""A worker's load counts what no report of it includes yet."""

import hypothesis.strategies as st
from hypothesis import given

from penstock.core.load import AccountStatistics, LoadBook
from penstock.shapes import Load


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


def test_statistics_are_what_is_added_to_the_report() -> None:
    book = LoadBook()
    book.sent("w", 1, uncached_tokens=40, context_tokens=200)
    book.sent("w", 2, uncached_tokens=60, context_tokens=300)
    book.book("w", "r1", 500)
    book.reported("w", 1, Load())
    assert book.statistics() == {"w": AccountStatistics(1, 1, 60, 800, sent=2)}
    book.forget("w")
    assert book.statistics() == {}


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


def test_the_attempts_of_an_instance_are_those_reported_and_those_on_their_way() -> None:
    book = LoadBook()
    assert book.requests("w") == 0
    for seq in (1, 2):
        book.sent("w", seq, 100, 100)
    book.book("w", "r", 50)  # promised, and not sent
    assert book.requests("w") == 2
    book.reported("w", 1, Load(running=3, waiting=4))
    assert book.requests("w") == 8
