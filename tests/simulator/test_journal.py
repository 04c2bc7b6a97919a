from __future__ import annotations

from simulator.journal import LAST_EVENTS, Journal


def test_same_events_have_the_same_digest() -> None:
    one, same, other = Journal(lambda: 1.0), Journal(lambda: 1.0), Journal(lambda: 2.0)
    for journal in (one, same, other):
        journal.note("start", "w0", 1)
    assert one.digest() == same.digest() != other.digest()


def test_first_violation_is_kept_and_shown_among_the_last_events() -> None:
    journal = Journal(lambda: 1.0)
    for number in range(LAST_EVENTS):
        journal.note("event", number)
    journal.violate("no crash", "it crashed")
    journal.violate("tokens", "too late to count")
    assert journal.violated.is_set()
    assert journal.violation is not None
    assert (journal.violation.invariant, journal.violation.detail) == ("no crash", "it crashed")
    assert len(journal.last_events()) == LAST_EVENTS
    assert journal.last_events()[-1] == "  1.000000 VIOLATION no crash it crashed"


def test_violations_that_nobody_minds_change_nothing() -> None:
    journal = Journal(lambda: 1.0, minded={"no crash"})
    before = journal.digest()
    journal.violate("tokens", "wrong ones")
    assert journal.violation is None
    assert journal.digest() == before


def test_closed_journal_takes_no_events() -> None:
    lines: list[str] = []
    journal = Journal(lambda: 1.0, lines.append)
    journal.note("before")
    journal.closed = True
    journal.note("after")
    journal.trace("after")
    journal.violate("tokens", "after")
    assert lines == ["  1.000000 before"]
    assert journal.violation is None
