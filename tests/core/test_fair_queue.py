"""Order and shares of what waits."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.fair_queue import FairQueue


def add(it: FairQueue, member: str, tenant: str = "", priority: int = 0, *, work: float = 100.0) -> None:
    it.add(member, member, tenant, priority, work)


def serve(it: FairQueue) -> str:
    """Serve the first entry, which has one member. Returns which that was."""
    entry = it.first()
    assert entry is not None
    (member,) = entry.members
    it.charge(entry, entry.work)
    it.remove(member)
    return member


def drain(it: FairQueue) -> list[str]:
    order = []
    while it.first() is not None:
        order.append(serve(it))
    assert (len(it), it.entries, it.work) == (0, 0, 0.0)
    return order


def test_tenants_take_turns_by_work() -> None:
    it = FairQueue()
    for number in range(20):
        add(it, f"greedy{number}", "greedy")
    for number in range(3):
        add(it, f"modest{number}", "modest", work=200.0)
    order = drain(it)
    # Two of the greedy ones for each of the modest ones, which are twice as long.
    assert [order.index(f"modest{number}") for number in range(3)] == [1, 4, 7]


def test_share_that_was_not_used_is_not_saved_up() -> None:
    it = FairQueue()
    for number in range(10):
        add(it, f"a{number}", "a")
    for _ in range(6):
        serve(it)
    for number in range(10):
        add(it, f"b{number}", "b")
    turns = Counter(member[0] for member in drain(it)[:8])
    assert turns == {"a": 4, "b": 4}


def test_work_that_left_unserved_costs_its_tenant_nothing() -> None:
    it = FairQueue()
    add(it, "other", "b")
    for number in range(50):
        add(it, f"a{number}", "a")
    for number in range(49):
        it.remove(f"a{number}")
    add(it, "late", "b")
    assert drain(it) == ["other", "a49", "late"]


def test_entry_served_in_parts_keeps_its_place_and_is_charged_for_each() -> None:
    it = FairQueue()
    add(it, "a0", "a", work=300.0)
    add(it, "a1", "a", work=100.0)
    add(it, "b0", "b", work=100.0)
    it.charge(it["a0"], 100.0)
    it.cut("a0", 100.0)
    assert it.work == 400.0
    assert serve(it) == "b0"
    it.charge(it["a0"], 100.0)
    it.cut("a0", 100.0)
    assert drain(it) == ["a0", "a1"]


def test_members_with_one_key_are_one_entry_until_the_last_has_left() -> None:
    it = FairQueue()
    for member in ("x0", "x1"):
        it.add(member, "x", "t", 0, 10.0)
    add(it, "y", "t")
    assert (len(it), it.entries, it["x0"].work) == (3, 2, 20.0)
    assert it["x0"] is it["x1"] is it.first()
    it.remove("x0")
    assert (len(it), it.entries, it["x1"].work) == (2, 2, 10.0)
    it.remove("x1")
    assert it.first() is it["y"]


def test_what_is_ahead_of_a_newcomer_is_what_is_served_before_it() -> None:
    it = FairQueue()
    add(it, "first", "other", -1, work=7.0)
    for number in range(6):
        add(it, f"a{number}", "a", work=100.0)
    add(it, "b0", "b", work=150.0)
    add(it, "last", "a", 1)
    # Of a, as much as of b, whose next start tag is 150.
    assert it.ahead("b", 0) == (7.0 + 150.0 + 150.0, 150.0)
    assert it.ahead("b", 0, 250.0) == (7.0 + 400.0 + 150.0, 150.0)
    assert it.ahead("b", -2) == (0.0, 0.0)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcde"), st.lists(st.floats(1, 100), min_size=1), min_size=2),
    st.randoms(use_true_random=False),
)
def test_shares_of_tenants_that_wait_all_the_time_are_equal(
    works: dict[str, list[float]], rng: random.Random
) -> None:
    """The work served of two of them never differs by more than their two largest entries together (Goyal
    and others, theorem 1)."""
    it = FairQueue()
    arrivals = [(tenant, work) for tenant, entries in works.items() for work in entries]
    rng.shuffle(arrivals)
    left = Counter(tenant for tenant, _ in arrivals)
    cost = {f"{tenant}{number}": work for number, (tenant, work) in enumerate(arrivals)}
    for number, (tenant, work) in enumerate(arrivals):
        add(it, f"{tenant}{number}", tenant, work=work)
    served = dict.fromkeys(works, 0.0)
    while all(left.values()):
        went = serve(it)
        served[went[0]] += cost[went]
        left[went[0]] -= 1
        for one in works:
            for other in works:
                assert served[one] - served[other] <= max(works[one]) + max(works[other]) + 1e-6


def test_tenant_does_not_starve_however_much_others_send() -> None:
    it = FairQueue()
    add(it, "patient", "p", work=500.0)
    for number in range(1000):
        add(it, f"g{number}", "g")
        if serve(it) == "patient":
            break
    assert number <= 1


def test_rounding_leaves_no_work_behind() -> None:
    it = FairQueue()
    for number in range(100):
        add(it, f"{number}", work=0.1 * number)
    for number in range(99):
        it.remove(f"{number}")
    assert it.work == pytest.approx(9.9)
    it.remove("99")
    assert it.work == 0.0
