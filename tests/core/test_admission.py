"""What waits for a worker: order, refusals, bounds, and the end of every request, without a router."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.admission import (
    REQUEST_BYTES,
    TOKEN_BYTES,
    AdmissionQueue,
    AdmissionQueues,
    AdmissionSettings,
    MemoryBudget,
    waiting_bytes,
)
from penstock.shapes import ModelKey, Request, Sampling, StructuredOutput

BUSY_MS = 1000.0  # at the workers: beyond the gate
TOKEN_MS = 1.0


def queue(**changes: object) -> AdmissionQueue:
    settings = AdmissionSettings(**changes)  # type: ignore[arg-type]
    return AdmissionQueues(settings, random.Random(1)).of(ModelKey("model", "revision"))


def dispatch(
    it: AdmissionQueue,
    request_id: str,
    wait_ms: float,
    workers: int = 1,
    now: float = 0.0,
) -> bool:
    """Whether the request was sent."""
    ahead = int(wait_ms / (100 * TOKEN_MS)) - 1  # each takes so long as one of 100 tokens
    return it.dispatch(request_id, wait_ms, workers, now, ahead=ahead) is not None


def request(request_id: str, tenant: str = "", priority: int = 0, *, call_id: str = "") -> Request:
    sampling = Sampling(max_tokens=8)
    fields = {"tenant": tenant, "priority": priority, "call_id": call_id}
    return Request(request_id, ModelKey("model", "revision"), [1], sampling, **fields)  # type: ignore[arg-type]


def enter(
    it: AdmissionQueue,
    request_id: str,
    tenant: str = "",
    priority: int = 0,
    *,
    work: float = 100.0,
    call_id: str = "",
    now: float = 0.0,
) -> None:
    it.enter(request(request_id, tenant, priority, call_id=call_id), work, now)


def requeue(it: AdmissionQueue, request_id: str, now: float = 0.0) -> None:
    it.requeue(request(request_id), 1.0, now)


def offer(it: AdmissionQueue, wait_ms: float, now: float = 0.0) -> str | None:
    """What a router does at a look: the head tries. Returns who went."""
    request_id = it.next()
    if request_id is None:
        return None
    return request_id if dispatch(it, request_id, wait_ms, now=now) else None


def drain(it: AdmissionQueue, now: float = 0.0) -> list[str]:
    gone = []
    while (request_id := offer(it, 0.0, now)) is not None:
        gone.append(request_id)
    return gone


# --- order ----------------------------------------------------------------------------------------


def test_only_request_is_sent_at_once_and_the_next_waits_until_a_worker_can_begin_it() -> None:
    it = queue()
    enter(it, "a")
    assert it.next() == "a"
    assert dispatch(it, "a", 250.0, 2)
    enter(it, "b")
    assert not dispatch(it, "b", 250.1, 2)
    enter(it, "c")
    assert it.next() == "b"
    assert drain(it, 1.0) == ["b", "c"]
    assert len(it) == 0
    assert it.next() is None


def test_seconds_waited_are_returned_when_a_request_is_sent() -> None:
    it = queue()
    enter(it, "a", now=1.0)
    assert it.dispatch("a", 0.0, 1, 3.5, ahead=0) == 2.5


def test_requests_go_by_priority_and_then_by_arrival() -> None:
    it = queue()
    for request_id, priority in (("a", 1), ("b", 0), ("c", -1), ("d", 0), ("e", 1)):
        enter(it, request_id, priority=priority)
    assert drain(it) == ["c", "b", "d", "a", "e"]


def test_requests_that_came_back_go_first_and_are_never_refused() -> None:
    it = queue(max_queued=2, max_wait_ms=100.0)
    enter(it, "a", priority=-(2**31))
    enter(it, "b")
    requeue(it, "lost")
    requeue(it, "bounced")
    assert it.refusal("", 0, 0.0) is not None
    assert drain(it) == ["lost", "bounced", "a", "b"]


def test_requests_that_came_back_are_sent_to_busy_workers() -> None:
    it = queue()
    enter(it, "new")
    requeue(it, "lost")
    assert dispatch(it, "lost", 5_000.0)
    assert not dispatch(it, "new", 5_000.0)


def test_choices_of_a_call_are_sent_together() -> None:
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


def fill(it: AdmissionQueue, count: int, tenant: str = "", *, now: float = 0.0) -> None:
    """So many wait, the workers being busy."""
    for number in range(count):
        enter(it, f"{tenant}{number}", tenant, now=now)
        offer(it, BUSY_MS, now)


def predict(it: AdmissionQueue, tenant: str, priority: int, now: float) -> float:
    """A newcomer's wait in ms."""
    return it.prediction.newcomer_ms(tenant, priority, now)


def test_newcomer_is_refused_when_requests_before_it_take_too_long() -> None:
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
    assert (refusals[0].reason, refusals[0].wait_ms) == ("wait", 8100.0)
    assert "wait_ms=8100 bound_ms=10000" in str(refusals[0])
    assert 1.0 <= refusals[0].retry_after_s <= 2.0
    assert refusals[0].retry_after_s == int(refusals[0].retry_after_s)
    assert it.saturation_ms() == 8100.0


def test_newcomer_that_goes_before_those_waiting_is_let_in() -> None:
    it = queue(max_wait_ms=5_000.0)
    fill(it, 40, "greedy")
    assert it.refusal("greedy", 0, 0.0) is not None
    assert it.refusal("modest", 0, 0.0) is None
    assert it.refusal("greedy", -1, 0.0) is None
    assert it.refusal("modest", 1, 0.0) is not None


def test_saturation_follows_the_measured_pace() -> None:
    it = queue(max_wait_ms=1e9)
    fill(it, 300)
    now = 0.0
    for _ in range(200):
        now += 0.5  # five times as long as guessed
        assert offer(it, 0.0, now) is not None
        assert offer(it, BUSY_MS, now) is None
    assert it.saturation_ms() == pytest.approx(BUSY_MS + 100 * 500, rel=0.1)


def test_predicted_wait_counts_the_tenants_that_keep_overtaking() -> None:
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
    wait_ms = predict(it, "a", 0, now)
    assert wait_ms == pytest.approx(it.prediction.head_ms + 40 * 200.0, rel=0.1)


def test_predicted_wait_counts_the_better_priorities_that_keep_coming() -> None:
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
    wait_ms = predict(it, "", 0, now)
    # The pace is that of the times in which something waited: all of them.
    assert wait_ms == pytest.approx(BUSY_MS + 200.0 / (1.0 - 0.99), rel=0.2)
    assert predict(it, "", -1, now) == BUSY_MS
    now += 60.0
    assert predict(it, "", 0, now) < BUSY_MS + 300.0  # forgotten


def test_only_request_is_refused_when_the_wait_at_the_workers_is_too_long() -> None:
    it = queue(max_wait_ms=1000.0)
    enter(it, "a")
    assert not dispatch(it, "a", 900.0)
    refusal = it.hopeless("a")
    assert refusal is not None
    assert (refusal.reason, refusal.wait_ms) == ("wait", 900.0)
    it.leave("a")
    assert it.refusal("", 0, 0.0) is None  # the last that was known of the workers does not stick
    enter(it, "b")
    assert dispatch(it, "b", 10.0)


def test_request_is_not_sent_to_wait_longer_at_a_worker_than_the_bound() -> None:
    it = queue(max_wait_ms=100.0)
    enter(it, "a")
    assert not dispatch(it, "a", 101.0)


# --- bounds ---------------------------------------------------------------------------------------


def crowd(it: AdmissionQueue, tenant: str, priority: int = 0) -> int:
    """Let calls in until one is refused for want of room."""
    count = 0
    while (refusal := it.refusal(tenant, priority, 0.0)) is None:
        enter(it, f"{tenant}{priority}-{count}", tenant, priority)
        count += 1
    assert refusal.reason == "full"
    return count


def test_queue_that_a_tenant_filled_has_places_for_others() -> None:
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


def test_requests_that_came_back_take_no_places_from_newcomers_without_a_key() -> None:
    it = queue(max_queued=1200)
    for number in range(700):
        requeue(it, f"{number}")
    assert crowd(it, "") == crowd(it, "other") * 2 == 250


def test_time_without_workers_does_not_change_the_pace() -> None:
    it = queue(max_wait_ms=1e9)
    for number in range(60):
        enter(it, f"{number}")
    now = 0.0
    for _ in range(20):
        now += 0.01
        offer(it, BUSY_MS, now)
        assert offer(it, 0.0, now) is not None
    before = it.prediction.pace.ms_per_unit
    it.hold("20", 0, now)
    now += 20.0
    for _ in range(20):
        assert offer(it, BUSY_MS, now) is None
        now += 0.01
        assert offer(it, 0.0, now) is not None
    assert it.prediction.pace.ms_per_unit <= before


def test_choices_of_a_call_are_let_in_with_the_first_whatever_waits() -> None:
    it = queue(max_queued=2)

    def refused(call_id: str) -> bool:
        return it.refusal("t", 0, 0.0, call_id=call_id) is not None

    enter(it, "before", "t")
    assert refused("call")
    offer(it, 0.0)
    enter(it, "call-0", "t", call_id="call")
    assert not refused("call")
    assert refused("")
    assert it.refusal("t", 1, 0.0, call_id="call") is None, "a flow of its own"
    offer(it, 0.0)
    enter(it, "next", "t")
    assert not refused("call")
    assert refused("another")
    offer(it, 0.0)
    enter(it, "last", "t")
    assert refused("call")


def test_full_queue_lets_only_requests_in_that_came_back() -> None:
    it = queue(max_queued=20)
    for number in range(20):
        assert it.refusal(f"t{number}", 0, 0.0) is None
        enter(it, f"{number}", f"t{number}")
    assert it.refusal("other", -1, 0.0) is not None
    requeue(it, "lost")
    assert len(drain(it)) == 21
    assert it.waiting.entries == 0


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
            self.queue.requeue(request(f"{self.asked}"), work, self.now)
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
        waiting = self.queue.waiting
        calls = {
            id(waiting[request_id]): waiting[request_id]
            for request_id in self.since
            if request_id in waiting
        }
        assert waiting.work == pytest.approx(sum(call.work for call in calls.values()), abs=1e-6)
        assert sum(len(call.members) for call in calls.values()) == len(self.queue)
        assert waiting.entries == len(calls)


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
    assert not any(vars(router.queue.waiting).values())


# --- memory ---------------------------------------------------------------------------------------


def spend(budget: MemoryBudget, tenant: str, size: int = 10) -> int:
    """Add requests until no more fit. Returns how many bytes this tenant got."""
    taken = 0
    while budget.fits(tenant, size):
        budget.add(tenant, size)
        taken += size
    return taken


def test_each_tenant_gets_half_of_the_memory_that_is_left() -> None:
    budget = MemoryBudget(1200)
    assert [spend(budget, tenant) for tenant in "abc"] == [600, 300, 150]
    assert budget.used == 1050


def test_memory_of_requests_that_left_is_free() -> None:
    budget = MemoryBudget(1200)
    spend(budget, "a")
    budget.add("a", -600)
    assert budget.used == 0
    assert spend(budget, "b") == 600


def test_request_of_any_size_may_wait_alone() -> None:
    budget = MemoryBudget(100)
    assert budget.fits("a", 1000)
    budget.add("a", 1000)
    assert not budget.fits("b", 1)


def test_request_takes_memory_for_its_tokens_and_its_schema() -> None:
    spec = StructuredOutput("json", "x" * 5000)
    plain = Request("r", ModelKey("m", "v"), [1] * 1000, Sampling(max_tokens=8))
    shaped = Request("r", ModelKey("m", "v"), [1] * 1000, Sampling(max_tokens=8, structured=spec))
    assert waiting_bytes(plain) == REQUEST_BYTES + 1000 * TOKEN_BYTES
    assert waiting_bytes(shaped) == waiting_bytes(plain) + 5000


SIZE = waiting_bytes(request("r"))


def test_queues_of_all_models_share_the_memory() -> None:
    queues = AdmissionQueues(AdmissionSettings(max_queued_bytes=SIZE * 5 // 2), random.Random(1))
    first, second = queues.of(ModelKey("first", "")), queues.of(ModelKey("second", ""))
    enter(first, "a", "t")
    assert second.refusal("t", 0, 0.0, size=SIZE // 2) is None
    refused = second.refusal("t", 0, 0.0, size=SIZE // 2 + 1)
    assert refused is not None
    assert (refused.reason, refused.limit) == ("full", "bytes")
    assert "reason=full limit=bytes" in str(refused)
    assert second.refusal("other", 0, 0.0, size=SIZE) is None
    first.leave("a")
    assert second.refusal("t", 0, 0.0, size=SIZE) is None


def test_memory_is_free_again_however_a_request_leaves() -> None:
    budget = MemoryBudget(100 * SIZE)
    it = AdmissionQueue(AdmissionSettings(), random.Random(1), budget)
    for number in range(3):
        enter(it, f"call-{number}", "t", call_id="call")
    enter(it, "single", "t")
    requeue(it, "lost")
    assert budget.used == 5 * SIZE
    assert dispatch(it, "lost", 0.0)
    assert budget.used == 4 * SIZE
    it.leave("call-1")
    assert budget.used == 3 * SIZE
    assert dispatch(it, "call-0", 0.0)  # the whole call is sent
    assert budget.used == 1 * SIZE
    it.leave("call-2")
    it.leave("single")
    it.leave("single")
    assert budget.used == 0
    assert spend(budget, "t", SIZE) == 50 * SIZE
