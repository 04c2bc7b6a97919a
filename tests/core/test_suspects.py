from __future__ import annotations

import random

from penstock.core.suspects import ACQUIT_TOKENS, MAX_DEATHS, Strikes, Suspect, apart
from penstock.structs import Card, Role

DECODE, PREFILL = Role.DECODE, Role.PREFILL


def card(instance_id: str, role: Role = DECODE) -> Card:
    return Card(instance_id, 1, role, "m", "reference", 16, 100, 4096, 1024)


CARDS = [card("p0", PREFILL), card("p1", PREFILL), card("d0"), card("d1"), card("d2")]


def names(cards: list[Card]) -> list[str]:
    return [card.instance_id for card in cards]


def test_without_suspects_everywhere() -> None:
    assert apart(0, CARDS, [], held=False) == CARDS
    assert sorted(names(apart(1, CARDS, [], held=False))) == ["d0", "d1", "d2", "p0", "p1"]
    assert apart(2, CARDS, [], held=False) == CARDS


def test_who_is_not_suspected_stays_away_from_prime_suspects_where_it_can() -> None:
    others = [Suspect(2, ("p0", "d1")), Suspect(1, ("p1", "d0"))]
    assert names(apart(0, CARDS, others, held=False)) == ["p1", "d0", "d2"]
    everywhere = [Suspect(2, ("", each)) for each in ("d0", "d1", "d2")]
    assert apart(0, CARDS, everywhere, held=False) == CARDS


def test_suspects_spread() -> None:
    others = [Suspect(1, ("", "d0")), Suspect(1, ("", "d0")), Suspect(1, ("", "d1"))]
    assert names(apart(1, CARDS, others, held=False)) == ["d2", "p0", "p1"]
    assert names(apart(1, CARDS[:4], others, held=False)) == ["d1", "p0", "p1"]


def test_prime_suspects_wait_for_a_place_of_their_own() -> None:
    others = [Suspect(2, ("p0", "d0")), Suspect(3, ("", "d1")), Suspect(1, ("", "d2"))]
    assert names(apart(2, CARDS, others, held=False)) == ["p1", "d2"]
    others.append(Suspect(2, ("", "d2")))
    assert apart(2, CARDS, others, held=False) == []
    others.append(Suspect(2, ("", "d2")))
    assert names(apart(2, CARDS, others, held=True)) == ["d0", "d1", "p1"]


def test_progress_acquits_and_must_be_longer_after_each_death() -> None:
    strikes = Strikes()
    strikes.add("d0", "killed", 100, died="d0@1")
    assert strikes.acquitted_at == 100 + 2 * ACQUIT_TOKENS
    strikes.acquit()
    assert (strikes.count, strikes.reasons, strikes.killed) == (0, [], [])
    strikes.add("d1", "killed", 200, died="d1@1")
    assert strikes.acquitted_at == 200 + 4 * ACQUIT_TOKENS


def test_three_deaths_make_a_cause_if_nobody_else_can_be_it() -> None:
    strikes = Strikes()
    for number in range(1, MAX_DEATHS + 1):
        strikes.add(f"d{number}", "killed", 10, died=f"d{number}@1")
        assert strikes.is_cause(3, alone=True) is (number >= 3)
        assert strikes.is_cause(3, alone=False) is (number >= MAX_DEATHS)


def test_whoever_is_connected_again_had_not_died() -> None:
    strikes = Strikes()
    strikes.add("d0", "reset", 10, died="d0@1")
    strikes.add("d1", "killed", 10, died="d1@1")
    strikes.survived({"d0@1", "d1@2"})
    assert (strikes.deaths, strikes.killed, strikes.failures) == (1, ["d1@1"], 1)


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
                records[name].add(victim, "killed", 10, died=f"{victim}@1")
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
        others = [Suspect(records[other].count, ("", place)) for other, place in places.items()]
        others = [other for other in others if other.strikes]
        may = apart(records[name].count, alive, others, held=False)
        if may:
            places[name] = rng.choice(may).instance_id
        else:
            # Meanwhile, a prime suspect that is none makes progress.
            done = [other for other in places if records[other].count >= 2 and other != poison]
            records[rng.choice(done)].acquit()
            lost.append(name)
