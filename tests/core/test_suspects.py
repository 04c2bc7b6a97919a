from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from penstock.core.suspects import ACQUIT_TOKENS, MAX_DEATHS, PRIME, Strikes, Suspects, alone_from
from penstock.shapes import Card, Incarnation, Role
from tests.cards import card

DECODE, PREFILL = Role.DECODE, Role.PREFILL


CARDS = [card("p0", PREFILL), card("p1", PREFILL), card("d0"), card("d1"), card("d2")]


def names(cards: list[Card]) -> list[str]:
    return [card.instance_id for card in cards]


def suspects(*others: tuple[int, tuple[str, ...]]) -> Suspects:
    """With requests of so many strikes on these instances."""
    it = Suspects()
    for number, (strikes, instances) in enumerate(others):
        it.note(f"o{number}", strikes, *instances)
    return it


def may_run(it: Suspects, strikes: int, cards: list[Card] = CARDS, *, held: bool = False) -> list[str]:
    return [card.instance_id for card in it.apart(strikes, cards, held=held)]


def test_without_suspects_everywhere() -> None:
    for strikes in range(3):
        assert sorted(may_run(suspects(), strikes)) == ["d0", "d1", "d2", "p0", "p1"]


def test_who_is_not_suspected_stays_away_from_prime_suspects_where_it_can() -> None:
    others = suspects((2, ("p0", "d1")), (1, ("p1", "d0")))
    assert may_run(others, 0) == ["p1", "d0", "d2"]
    everywhere = suspects(*((2, ("", each)) for each in ("d0", "d1", "d2")))
    assert may_run(everywhere, 0) == names(CARDS)


def test_suspects_spread() -> None:
    others = suspects((1, ("", "d0")), (1, ("", "d0")), (1, ("", "d1")))
    assert may_run(others, 1) == ["d2", "p0", "p1"]
    assert may_run(others, 1, CARDS[:4]) == ["d1", "p0", "p1"]


def test_one_that_decodes_where_it_was_booked_counts_once() -> None:
    others = suspects((1, ("d0", "d0")), (1, ("", "d1")), (1, ("", "d1")))
    assert may_run(others, 1, CARDS[:4]) == ["d0", "p0", "p1"]


def test_prime_suspects_wait_for_a_place_of_their_own() -> None:
    others = suspects((2, ("p0", "d0")), (3, ("", "d1")), (1, ("", "d2")))
    assert may_run(others, 2) == ["p1", "d2"]
    others.note("o3", 2, "", "d2")
    assert may_run(others, 2) == []
    others.note("o4", 2, "", "d2")
    assert may_run(others, 2, held=True) == ["d0", "d1", "p1"]


def test_a_request_alone_with_as_many_deaths_can_be_the_cause() -> None:
    assert alone_from([2]) == 0
    assert alone_from([2, 1, 0]) == 2
    assert alone_from([2, 2, 0]) == 3


def test_asking_where_a_suspect_may_run_changes_nothing() -> None:
    others = suspects((2, ("", "d0")))
    assert may_run(others, 2) == may_run(others, 2) == ["p0", "p1", "d1", "d2"]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 5), st.integers(0, 3), st.sampled_from(["", *"abc"]), st.sampled_from("abc")
        )
    )
)
def test_the_counts_are_those_of_whoever_was_noted_last(notes: list[tuple[int, int, str, str]]) -> None:
    it, last = Suspects(), {}
    for request, strikes, prefill, decode in notes:
        it.note(f"r{request}", strikes, prefill, decode)
        last[request] = (strikes, {prefill, decode} - {""})
    some, prime = Counter[str](), Counter[str]()
    for strikes, places in last.values():
        some.update(places if strikes else ())
        prime.update(places if strikes >= PRIME else ())
    cards = [card(name) for name in "abc"]
    least = min(some[name] for name in "abc")
    assert names(it.apart(1, cards)) == [name for name in "abc" if some[name] == least]
    assert names(it.apart(2, cards)) == [name for name in "abc" if not prime[name]]
    for request, (strikes, _) in last.items():
        assert (f"r{request}" in it) is bool(strikes)


def test_progress_acquits_and_must_be_longer_after_each_death() -> None:
    strikes = Strikes()
    strikes.add("d0", "killed", 100, died=Incarnation("d0", 1))
    assert strikes.acquitted_at == 100 + 2 * ACQUIT_TOKENS
    strikes.acquit()
    assert (strikes.count, strikes.reasons, strikes.killed) == (0, [], [])
    strikes.add("d1", "killed", 200, died=Incarnation("d1", 1))
    assert strikes.acquitted_at == 200 + 4 * ACQUIT_TOKENS


def test_three_deaths_make_a_cause_if_no_other_request_can_be_it() -> None:
    strikes = Strikes()
    for number in range(1, MAX_DEATHS + 1):
        strikes.add(f"d{number}", "killed", 10, died=Incarnation(f"d{number}", 1))
        assert strikes.is_cause(3, alone=True) is (number >= 3)
        assert strikes.is_cause(3, alone=False) is (number >= MAX_DEATHS)


def test_deaths_beside_work_of_other_frontends_make_a_cause_only_at_the_limit() -> None:
    strikes = Strikes(shared=True)
    for number in range(1, MAX_DEATHS + 1):
        strikes.add(f"d{number}", "killed", 10, died=Incarnation(f"d{number}", 1))
        assert strikes.is_cause(3, alone=True) is (number >= MAX_DEATHS)
    strikes.acquit()
    assert not strikes.shared


def test_whoever_is_connected_again_had_not_died() -> None:
    strikes = Strikes()
    strikes.add("d0", "reset", 10, died=Incarnation("d0", 1))
    strikes.add("d1", "killed", 10, died=Incarnation("d1", 1))
    strikes.survived({Incarnation("d0", 1), Incarnation("d1", 2)})
    assert (strikes.deaths, strikes.killed, strikes.failures) == (1, [Incarnation("d1", 1)], 1)


def test_one_poisonous_request_among_many_is_found_by_its_third_death() -> None:
    """Four instances, none of which comes back; whoever shares one with the poison dies with it."""
    for seed in range(200):
        rng = random.Random(seed)
        alive = [card(f"d{number}") for number in range(4)]
        records = {f"r{number}": Strikes() for number in range(rng.randint(1, 40))}
        poison = rng.choice(list(records))
        places = {name: rng.choice(alive).instance_id for name in records}
        deaths = 0
        while records[poison].deaths < 3:
            victim = places[poison]
            alive = [each for each in alive if each.instance_id != victim]
            lost = [name for name, place in places.items() if place == victim]
            deaths += 1
            for name in lost:
                records[name].add(victim, "killed", 10, died=Incarnation(victim, 1))
                del places[name]
            rng.shuffle(lost)
            _place_all(lost, records, places, alive, rng, poison)
        assert deaths == 3
        assert all(record.deaths < 3 for name, record in records.items() if name != poison)


def _place_all(
    lost: list[str],
    records: dict[str, Strikes],
    places: dict[str, str],
    alive: list[Card],
    rng: random.Random,
    poison: str,
) -> None:
    """Whoever has to wait does, until the poison is placed: it will make room."""
    while poison not in places and lost:
        name = lost.pop(0)
        others = suspects(*((records[other].count, ("", place)) for other, place in places.items()))
        may = others.apart(records[name].count, alive)
        if may:
            places[name] = rng.choice(may).instance_id
        else:
            # Meanwhile, a prime suspect that is none makes progress.
            done = [other for other in places if records[other].count >= 2 and other != poison]
            records[rng.choice(done)].acquit()
            lost.append(name)
