"""Whose slice is next, who is refused, and when, without a thread or a text."""

from __future__ import annotations

import random

import pytest

from penstock.core.tokenizer_queue import SLICE_CHARS, TokenizerLimits, TokenizerQueue
from penstock.core.wait_prediction import Refusal

MS_PER_CHAR = 1e-3
MIB = 1024 * 1024


class Bench:
    """A queue with a thread that takes its time, on a virtual clock."""

    def __init__(self, limits: TokenizerLimits = TokenizerLimits()) -> None:  # noqa: B008 frozen
        self.queue = TokenizerQueue(limits, random.Random(1))
        self.now = 0.0
        self.left: dict[str, int] = {}
        self.uncut: set[str] = set()  # that go in one slice
        self.running = ""

    def enter(
        self, job_id: str, tenant: str = "", chars: int = SLICE_CHARS, priority: int = 0
    ) -> Refusal | None:
        self.left[job_id] = chars
        refusal = self.queue.enter(job_id, tenant, priority, chars, self.now)
        if refusal is not None:
            self.queue.leave(job_id)
        return refusal

    def begin(self) -> str | None:
        job_id = self.queue.next()
        if job_id is not None:
            chars = self.left[job_id] if job_id in self.uncut else min(SLICE_CHARS, self.left[job_id])
            self.left[job_id] -= chars
            self.queue.begin(job_id, chars, self.now, last=not self.left[job_id])
            self.running, self.chars = job_id, chars
        return job_id

    def end(self, ms_per_char: float = MS_PER_CHAR) -> None:
        self.now += self.chars * ms_per_char / 1e3
        self.queue.end(self.now)

    def drain(self, most: int = 10_000, ms_per_char: float = MS_PER_CHAR) -> list[str]:
        """Whose slices went, in order; one that is running is ended first."""
        if self.running:
            self.end(ms_per_char)
            self.running = ""
        order: list[str] = []
        while len(order) < most and (job_id := self.begin()) is not None:
            order.append(job_id)
            self.end(ms_per_char)
            self.running = ""
        return order


def test_pace_is_that_of_the_thread_however_prompts_are_cut() -> None:
    """A short last slice is not taken for as much work as the long one before it."""
    it = Bench()
    for number in range(200):
        assert it.enter(f"{number}", chars=SLICE_CHARS + 464) is None
        it.drain(ms_per_char=3e-4)
        it.now += 1.0
    it.enter("sample", chars=SLICE_CHARS)
    assert it.queue.wait_ms(it.now) == pytest.approx(3e-4 * SLICE_CHARS, rel=0.01)
    it.drain(ms_per_char=3e-4)
    for number in range(200, 260):
        assert it.enter(f"{number}", chars=SLICE_CHARS + 464) is None


def test_prompts_are_tokenized_slice_by_slice_one_at_a_time() -> None:
    it = Bench()
    assert it.enter("a", chars=2 * SLICE_CHARS + 1) is None
    assert it.begin() == "a"
    assert it.begin() is None
    assert (len(it.queue), it.queue.chars()) == (1, SLICE_CHARS + 1)
    assert it.drain() == ["a", "a"]
    assert (len(it.queue), it.queue.chars(), it.queue.wait_ms(it.now)) == (0, 0, 0)


def test_short_prompt_waits_for_one_slice_of_another_tenants_long_ones() -> None:
    it = Bench()
    for number in range(2):
        assert it.enter(f"greedy{number}", "greedy", 40 * SLICE_CHARS) is None
    assert it.begin() == "greedy0"
    assert it.enter("short", "modest", 9000) is None
    assert it.drain(3) == ["short", "greedy0", "greedy0"]
    # A long one of the other shares equally, and a tenant's own go one after the other.
    assert it.enter("long", "modest", 20 * SLICE_CHARS) is None
    order = it.drain()
    assert 18 <= order[:40].count("long") <= 21
    assert order.index("greedy1") > 37 + 15
    assert "greedy0" not in order[order.index("greedy1") :]


def test_prompts_go_by_priority() -> None:
    it = Bench()
    it.enter("late", priority=1, chars=3 * SLICE_CHARS)
    it.enter("soon", priority=0)
    it.begin()
    it.enter("first", priority=-1)
    assert it.running == "soon"
    assert it.drain() == ["first", "late", "late", "late"]


def test_prompts_that_would_wait_too_long_and_no_others_are_refused() -> None:
    it = Bench()
    assert it.enter("a", "greedy", 4_000_000) is None
    it.begin()
    it.enter("b", "greedy", 4_065_536)
    why = it.enter("c", "greedy", 4_000_000)
    assert why is not None
    assert why.reason == "wait"
    assert why.wait_ms == pytest.approx(8065.536)
    assert "waiting for the tokenizer (reason=wait wait_ms=8066 bound_ms=10000)" in str(why)
    assert it.enter("d", "modest", 100_000) is None
    # It would go between the others' slices, and end last.
    assert it.enter("e", "another", 8_300_000)
    assert it.enter("f", "another", 10_000) is None
    assert it.enter("g", "greedy", 10, priority=-1) is None


def test_prediction_follows_the_measured_pace() -> None:
    it = Bench()
    it.enter("a", "one", 100 * SLICE_CHARS)
    it.drain(60, ms_per_char=5e-3)
    assert it.enter("b", "two", 30 * SLICE_CHARS)  # 10 s
    assert it.enter("c", "two", 10 * SLICE_CHARS) is None


def test_slice_in_work_counts_when_nothing_waits() -> None:
    it = Bench()
    it.uncut.add("a")
    it.enter("a", "one", 9_000_000)
    it.begin()
    assert len(it.queue) == 0
    assert it.enter("b", "two")
    it.now = 2.0
    assert it.enter("c", "two") is None
    assert it.queue.wait_ms(it.now) == pytest.approx(7000, rel=0.02)


def test_tenant_that_sends_most_characters_leaves_room_for_others() -> None:
    it = Bench(TokenizerLimits(max_wait_ms=1e9, max_chars=8 * MIB))
    for number in range(4):
        assert it.enter(f"a{number}", "greedy", MIB) is None
    why = it.enter("a4", "greedy", MIB, priority=1)
    assert why is not None
    assert why.reason == "full"
    assert it.enter("b", "modest", 2 * MIB) is None
    assert it.enter("c", "modest", 2 * MIB)
    assert it.enter("d", "another", 2 * MIB) is None


def test_any_number_of_short_prompts_may_wait() -> None:
    it = Bench()
    for number in range(10_000):
        assert it.enter(f"{number}", chars=160) is None
    assert it.queue.wait_ms(it.now) == pytest.approx(10_000 * 160 * MS_PER_CHAR, rel=0.01)


def test_refusal_names_the_limit_that_was_reached() -> None:
    it = Bench(TokenizerLimits(max_wait_ms=1e9, max_chars=MIB))
    assert it.enter("a", chars=MIB // 2) is None
    why = it.enter("b", chars=MIB // 2)
    assert why is not None
    assert "reason=full limit=characters" in str(why)


def test_prompts_that_left_are_not_tokenized() -> None:
    it = Bench()
    for job_id in ("a", "b", "c"):
        it.enter(job_id, chars=5 * SLICE_CHARS)
    it.begin()
    it.queue.leave("a")
    it.queue.leave("b")
    it.queue.leave("unknown")
    assert len(it.queue) == 1
    assert it.drain() == ["c"] * 5


def test_predicted_wait_counts_the_prompts_of_better_priority_that_keep_coming() -> None:
    """Half of the thread's time goes to them, so a low prompt waits for twice as long."""
    it = Bench()
    it.enter("low", priority=1, chars=300 * SLICE_CHARS)
    for number in range(150):
        assert it.enter(f"high{number}") is None
        assert it.drain(2) == [f"high{number}", "low"]
    waiting_s = it.left["low"] * MS_PER_CHAR / 1e3
    assert waiting_s == pytest.approx(9.8, rel=0.01)
    why = it.enter("newcomer", priority=1)
    assert why is not None
    assert why.wait_ms == pytest.approx(2e3 * waiting_s, rel=0.2)
