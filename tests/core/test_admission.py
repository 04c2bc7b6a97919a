"""Order, shares, predictions and the end of everything that waits, without a router."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.admission import AdmissionSettings, Queue

BUSY_MS = 1000.0  # at the workers: beyond the gate
TOKEN_MS = 1.0


def queue(**changes: object) -> Queue:
    return Queue(AdmissionSettings(**changes), random.Random(1))  # type: ignore[arg-type]


def enter(
    it: Queue,
    request_id: str,
    tenant: str = "",
    priority: int = 0,
    *,
    work: float = 100.0,
    call_id: str = "",
    now: float = 0.0,
) -> None:
    it.enter(request_id, call_id, tenant, priority, work, now)


def offer(it: Queue, wait_ms: float, now: float = 0.0) -> str | None:
    """What a router does at a look: the head tries. Returns who went."""
    request_id = it.next()
    if request_id is None:
        return None
    if not it.may_go(request_id, wait_ms, 1, now):
        it.guess(TOKEN_MS, 100.0)
        return None
    it.take(request_id, now)
    return request_id


def drain(it: Queue, now: float = 0.0) -> list[str]:
    gone = []
    while (request_id := offer(it, 0.0, now)) is not None:
        gone.append(request_id)
    return gone


# --- order ----------------------------------------------------------------------------------------


def test_the_only_one_goes_at_once_and_the_next_waits_its_turn() -> None:
    it = queue()
    enter(it, "a")
    assert it.turn("a")
    assert it.may_go("a", 250.0, 2, 0.0)
    assert it.take("a", 0.0) == 0.0
    enter(it, "b")
    assert not it.may_go("b", 250.1, 2, 0.0)
    enter(it, "c")
    assert not it.turn("c")
    assert not it.may_go("b", 0.0, 2, 0.5, crowded=True)
    assert drain(it, 1.0) == ["b", "c"]
    assert len(it) == 0
    assert it.next() is None


def test_lower_priorities_first_then_arrival() -> None:
    it = queue()
    for request_id, priority in (("a", 1), ("b", 0), ("c", -1), ("d", 0), ("e", 1)):
        enter(it, request_id, priority=priority)
    assert drain(it) == ["c", "b", "d", "a", "e"]


def test_who_comes_back_goes_before_all_and_is_never_refused() -> None:
    it = queue(max_queued=2, max_wait_ms=100.0)
    enter(it, "a", priority=-(2**31))
    enter(it, "b")
    it.back("lost", 1.0, 0.0)
    it.back("bounced", 1.0, 0.0)
    assert it.refusal("", 0, 0.0) is not None
    assert drain(it) == ["lost", "bounced", "a", "b"]


def test_who_comes_back_does_not_wait_for_the_gate() -> None:
    it = queue()
    enter(it, "new")
    it.back("lost", 1.0, 0.0)
    assert it.may_go("lost", 5_000.0, 1, 0.0, crowded=True)
    it.take("lost", 0.0)
    assert not it.may_go("new", 5_000.0, 1, 0.0)


def test_tenants_take_turns_by_work() -> None:
    it = queue()
    for number in range(20):
        enter(it, f"greedy{number}", "greedy")
    for number in range(3):
        enter(it, f"modest{number}", "modest", work=200.0)
    order = drain(it)
    # Two of the greedy ones for each of the modest ones, which are twice as long.
    assert [order.index(f"modest{number}") for number in range(3)] == [1, 4, 7]


def test_nothing_is_saved_up_by_not_asking() -> None:
    it = queue()
    for number in range(10):
        enter(it, f"a{number}", "a")
    for _ in range(6):
        offer(it, 0.0)
    for number in range(10):
        enter(it, f"b{number}", "b")
    turns = Counter(request_id[0] for request_id in drain(it)[:8])
    assert turns == {"a": 4, "b": 4}


def test_what_was_never_served_costs_nothing() -> None:
    it = queue()
    enter(it, "other", "b")
    for number in range(50):
        enter(it, f"a{number}", "a")
    for number in range(49):
        it.leave(f"a{number}")
    enter(it, "late", "b")
    assert drain(it) == ["other", "a49", "late"]


def test_the_choices_of_a_call_go_together() -> None:
    it = queue()
    enter(it, "x")
    for number in range(3):
        enter(it, f"a{number}", call_id="a")
    enter(it, "b0", call_id="b")
    assert offer(it, 0.0) == "x"
    assert offer(it, 0.0) == "a0"
    assert offer(it, BUSY_MS) == "a1"  # whatever the load by now
    it.leave("a2")
    assert offer(it, BUSY_MS) is None
    assert offer(it, 0.0) == "b0"
    enter(it, "b1", call_id="b")  # comes right after
    assert offer(it, BUSY_MS) == "b1"
    assert len(it) == 0


# --- predictions ----------------------------------------------------------------------------------


def fill(it: Queue, count: int, tenant: str = "", *, now: float = 0.0) -> None:
    """So many wait, the workers being busy."""
    for number in range(count):
        enter(it, f"{tenant}{number}", tenant, now=now)
        offer(it, BUSY_MS, now)


def test_a_newcomer_is_refused_when_those_before_it_take_too_long() -> None:
    it = queue(max_wait_ms=10_000.0)
    refusals = []
    for number in range(100):
        refusal = it.refusal("", 0, 0.0)
        if refusal is None:
            enter(it, str(number))
            offer(it, BUSY_MS)
        else:
            refusals.append(refusal)
    # 8000 ms less 1000 at the workers, at first guess 1 ms per unit of work.
    assert len(it) == 71
    assert (refusals[0].reason, refusals[0].wait_ms, refusals[0].place) == ("wait", 8100.0, 71)
    assert "wait_ms=8100 bound_ms=10000 place=71" in str(refusals[0])
    assert 1.0 <= refusals[0].retry_after_s <= 2.0
    assert refusals[0].retry_after_s == int(refusals[0].retry_after_s)
    assert it.saturation_ms() == 8100.0


def test_who_ranks_better_is_let_in_all_the_same() -> None:
    it = queue(max_wait_ms=5_000.0)
    fill(it, 40, "greedy")
    assert it.refusal("greedy", 0, 0.0) is not None
    assert it.refusal("modest", 0, 0.0) is None
    assert it.refusal("greedy", -1, 0.0) is None
    assert it.refusal("modest", 1, 0.0) is not None


def test_the_pace_is_learned() -> None:
    it = queue(max_wait_ms=1e9)
    fill(it, 300)
    now = 0.0
    for _ in range(200):
        now += 0.5  # five times as long as guessed
        assert offer(it, 0.0, now) is not None
        assert offer(it, BUSY_MS, now) is None
    assert it.saturation_ms() == pytest.approx(BUSY_MS + 100 * 500, rel=0.1)


def test_a_tenant_that_others_overtake_learns_that_too() -> None:
    """`b` comes now and then and always goes first; `a` gets every second turn only."""
    it = queue(max_wait_ms=1e9)
    fill(it, 100, "a")
    now, gone = 0.0, Counter[str]()
    for number in range(120):
        now += 0.1
        enter(it, f"b{number}", "b", -1, now=now)
        went = offer(it, 0.0, now)
        assert went is not None
        gone[went[0]] += 1
        now += 0.1
        went = offer(it, 0.0, now)
        assert went is not None
        gone[went[0]] += 1
        if gone["a"] >= 60:
            break
    assert gone["a"] == gone["b"] == 60
    wait_ms, place = it._predict("a", 0, now)
    assert place == 40
    assert wait_ms == pytest.approx(it._head_ms + 40 * 200.0, rel=0.1)


def test_a_line_is_slowed_down_by_what_keeps_coming_before_it() -> None:
    it = queue(max_wait_ms=8000.0)
    fill(it, 1)
    now = 0.0
    for number in range(200):  # half of what the workers can do, at 1 ms for a token
        enter(it, f"high{number}", priority=-1, now=now)
        offer(it, BUSY_MS, now)
        now += 0.1
        assert offer(it, 0.0, now) == f"high{number}"
        offer(it, BUSY_MS, now)
        now += 0.1
    it.leave("0")
    enter(it, "again", now=now)
    offer(it, BUSY_MS, now)
    wait_ms, place = it._predict("", 0, now)
    assert place == 1
    # The pace is that of the times in which something waited: all of them.
    assert wait_ms == pytest.approx(BUSY_MS + 200.0 / (1.0 - 0.99), rel=0.2)
    assert it._predict("", -1, now)[0] == BUSY_MS
    now += 60.0
    assert it._predict("", 0, now)[0] < BUSY_MS + 300.0  # forgotten


def test_alone_and_without_hope() -> None:
    it = queue(max_wait_ms=1000.0)
    enter(it, "a")
    assert not it.may_go("a", 900.0, 1, 0.0)
    refusal = it.hopeless("a")
    assert refusal is not None
    assert (refusal.reason, refusal.wait_ms) == ("wait", 900.0)
    it.leave("a")
    assert it.refusal("", 0, 0.0) is None  # the last that was known of the workers does not stick
    enter(it, "b")
    assert it.may_go("b", 10.0, 1, 0.0)


def test_the_gate_is_no_wider_than_the_longest_wait() -> None:
    it = queue(max_wait_ms=100.0)
    enter(it, "a")
    assert not it.may_go("a", 101.0, 1, 0.0)


# --- bounds ---------------------------------------------------------------------------------------


def crowd(it: Queue, tenant: str, priority: int = 0) -> int:
    """Let calls in until one is refused for want of room."""
    count = 0
    while (refusal := it.refusal(tenant, priority, 0.0)) is None:
        enter(it, f"{tenant}{priority}-{count}", tenant, priority)
        count += 1
    assert refusal.reason == "full"
    return count


def test_a_full_queue_has_room_for_others() -> None:
    """Each gets half of what is left, and one with many priorities two thirds of the whole."""
    it = queue(max_queued=1200)
    assert crowd(it, "a") == 600
    assert crowd(it, "b") == 300
    assert crowd(it, "c", -1) == 150
    it = queue(max_queued=1200)
    assert sum(crowd(it, "a", priority) for priority in range(50)) == 800
    assert crowd(it, "b") == 200
    it.leave("a0-0")
    assert it.refusal("a", 0, 0.0) is not None
    assert it.refusal("b", 0, 0.0) is None


def test_who_came_back_takes_no_room_from_newcomers_without_a_key() -> None:
    it = queue(max_queued=1200)
    for number in range(700):
        it.back(f"{number}", 1.0, 0.0)
    assert crowd(it, "") == crowd(it, "other") * 2 == 250


def test_an_outage_is_no_measure_of_the_pace() -> None:
    it = queue(max_wait_ms=1e9)
    for number in range(60):
        enter(it, f"{number}")
    now = 0.0
    for _ in range(20):
        now += 0.01
        offer(it, BUSY_MS, now)
        assert offer(it, 0.0, now) is not None
    before = it.pace
    it.nobody()
    now += 20.0
    for _ in range(20):
        assert offer(it, BUSY_MS, now) is None
        now += 0.01
        assert offer(it, 0.0, now) is not None
    assert it.pace <= before


def test_the_choices_of_a_call_are_let_in_with_the_first() -> None:
    it = queue()
    assert not it.holds("call", "t", 0)
    enter(it, "call-0", "t", call_id="call")
    assert it.holds("call", "t", 0)
    assert not it.holds("", "t", 0)
    offer(it, 0.0)
    assert it.holds("call", "t", 0)
    enter(it, "next", "t")
    offer(it, 0.0)
    assert not it.holds("call", "t", 0)


def test_the_last_place_is_taken_and_no_more() -> None:
    it = queue(max_queued=20)
    for number in range(20):
        assert it.refusal(f"t{number}", 0, 0.0) is None
        enter(it, f"{number}", f"t{number}")
    assert it.refusal("other", -1, 0.0) is not None
    it.back("lost", 1.0, 0.0)
    assert len(drain(it)) == 21
    assert it._waiting == 0


# --- whatever happens -----------------------------------------------------------------------------

ACTIONS = st.tuples(
    st.sampled_from(["ask", "ask", "ask", "go", "go", "busy", "leave", "back", "tick"]),
    st.integers(0, 3),  # tenant, or which
    st.integers(-1, 1),  # priority
    st.floats(1.0, 500.0),  # work
    st.floats(0.0, 2.0),  # seconds until then
)


class Router:
    """Plays the router's part, and checks that every request ends exactly once."""

    def __init__(self, max_queued: int, max_wait_ms: float) -> None:
        self.queue = queue(max_queued=max_queued, max_wait_ms=max_wait_ms)
        self.now = 0.0
        self.asked = 0
        self.since: dict[str, float] = {}  # of those that wait
        self.ended: Counter[str] = Counter()

    def end(self, request_id: str) -> None:
        del self.since[request_id]
        self.ended[request_id] += 1
        self.queue.leave(request_id)

    def act(self, action: str, which: int, priority: int, work: float, seconds: float) -> None:
        self.now += seconds
        waiting = list(self.since)
        if action == "ask":
            self.ask(f"t{which}", priority, work, choices=1 + which % 2)
        elif action == "go":
            went = offer(self.queue, 0.0, self.now)
            assert (went is None) == (not waiting), "the queue stands still"
            if went is not None:
                self.end(went)
        elif action == "busy":
            went = offer(self.queue, BUSY_MS, self.now)
            if went is not None:  # follows another choice of its call
                self.end(went)
        elif action == "leave" and waiting:
            self.end(waiting[which % len(waiting)])
        elif action == "back":
            self.asked += 1
            self.since[f"{self.asked}"] = self.now
            self.queue.back(f"{self.asked}", work, self.now)
        self.check()

    def ask(self, tenant: str, priority: int, work: float, choices: int) -> None:
        if self.queue.refusal(tenant, priority, self.now) is not None:
            return
        self.asked += 1
        for choice in range(choices):
            request_id = f"{self.asked}-{choice}"
            self.since[request_id] = self.now
            enter(
                self.queue, request_id, tenant, priority, work=work, call_id=f"{self.asked}", now=self.now
            )

    def check(self) -> None:
        assert all(count == 1 for count in self.ended.values())
        assert all(request_id in self.queue for request_id in self.since)
        assert len(self.queue) <= len(self.since)
        work = sum(line.work for line in self.queue._lines.values())
        calls = {id(call): call for call in self.queue._calls.values()}
        assert work == pytest.approx(sum(call.work for call in calls.values()), abs=1e-6)
        assert sum(line.calls for line in self.queue._lines.values()) == len(calls) == self.queue._waiting


@settings(max_examples=200, deadline=None)
@given(st.lists(ACTIONS, max_size=80), st.integers(1, 8), st.sampled_from([500.0, 3000.0, 1e6]))
def test_every_request_ends_exactly_once(
    actions: list[tuple[str, int, int, float, float]], max_queued: int, max_wait_ms: float
) -> None:
    router = Router(max_queued, max_wait_ms)
    for action in actions:
        router.act(*action)
    router.act("tick", 0, 0, 1.0, 0.0)
    while (went := offer(router.queue, 0.0, router.now)) is not None:
        router.end(went)
    assert not router.since
    assert not router.queue._lines


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcde"), st.lists(st.floats(1, 100), min_size=1), min_size=2),
    st.randoms(use_true_random=False),
)
def test_shares_are_fair_while_there_is_something_to_share(
    works: dict[str, list[float]], rng: random.Random
) -> None:
    """Between two tenants that both wait all the time, the work served never differs by more than their
    two largest calls together (Goyal and others, theorem 1)."""
    it = queue(max_wait_ms=1e9)
    arrivals = [(tenant, work) for tenant, calls in works.items() for work in calls]
    rng.shuffle(arrivals)
    left: Counter[str] = Counter()
    cost = {}
    for number, (tenant, work) in enumerate(arrivals):
        cost[f"{tenant}{number}"] = work
        left[tenant] += 1
        enter(it, f"{tenant}{number}", tenant, work=work)
    served = dict.fromkeys(works, 0.0)
    while all(left.values()):
        went = offer(it, 0.0)
        assert went is not None
        served[went[0]] += cost[went]
        left[went[0]] -= 1
        for one in works:
            for other in works:
                assert served[one] - served[other] <= max(works[one]) + max(works[other]) + 1e-6


def test_no_tenant_starves_however_many_the_others_send() -> None:
    it = queue(max_wait_ms=1e9)
    enter(it, "patient", "p", work=500.0)
    waited = 0
    for number in range(1000):
        enter(it, f"g{number}", "g")
        if offer(it, 0.0) == "patient":
            break
        waited += 1
    assert waited <= 1


def test_parts_keep_their_place_and_are_paid_one_by_one() -> None:
    it = queue()
    enter(it, "a0", "a", work=300.0)
    enter(it, "a1", "a", work=100.0)
    enter(it, "b0", "b", work=100.0)
    it.take_part("a0", 100.0, 0.0)
    assert it.work == 400.0
    assert it.next() == "b0"
    it.take("b0", 0.0)
    it.take_part("a0", 100.0, 0.0)
    assert drain(it) == ["a0", "a1"]
    assert it.work == 0.0
