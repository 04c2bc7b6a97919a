"""Who may be killing engines.

Theory. Some requests kill the engine that computes them. Retried without thought, one takes down every
worker; and all who shared an engine with it lose as many attempts as it does, so counting attempts alone
would fail them with it. Nobody can tell them apart after one death. But the cause is in every death, and
the others need not be: whoever lost attempts is a suspect, and suspects are kept apart.

    strikes  where the next attempt may run
    -------  ------------------------------------------------------------------------------------
    0        anywhere, but rather not beside a prime suspect
    1        beside as few suspects as possible
    2, more  (a prime suspect) not beside another one; it waits for such a place, for `HOLD_S` at most,
             then beside as few as possible

So the second death leaves a few prime suspects, the third has one of them at most, and that is the cause:
it is stopped, and named. Progress beyond the point where the attempts were lost acquits; it must be
longer with every death, so that one that kills late is found as well.

Strikes are attempts lost in any way (deaths, errors, deadlines, standing still): what kills an engine may
also hang it, or fail its batch. Only deaths make a request the cause of one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from penstock.structs import Card

PRIME = 2
"""Strikes that make a prime suspect."""

HOLD_S = 5.0
"""How long a prime suspect waits for a place of its own. When hundreds of requests lost two attempts each
(two machines failed under load), there are not so many places; then the next death divides them."""

CONFIRM_S = 1.0
"""How long a request waits after its second death, and each that follows: a worker that only lost its link
is connected again by then."""

ACQUIT_TOKENS = 8
"""Progress that acquits of a strike; doubles with each of the first deaths."""

MOST_DOUBLINGS = 5
"""A long request in a long outage sees many deaths that are not its own."""

MAX_DEATHS = 6
"""Deaths in a row without progress that no request survives, whoever else was there each time: the requests
of other frontends, or too many suspects for the places."""


@dataclass(slots=True)
class Strikes:
    """One request's record: what its attempts came to since it last made progress."""

    count: int = 0
    failures: int = 0  # attempts that ended badly while their instance lived on, or was only silent
    moves: int = 0  # attempts taken away from an instance that stood still
    deaths: int = 0  # of the instance under an attempt
    acquitted_at: int = 0  # tokens of prompt and output that are progress
    reasons: list[str] = field(default_factory=list)
    killed: list[str] = field(default_factory=list)  # incarnations that died under it
    lost: int = 0  # attempts, whatever came after them
    _all_deaths: int = 0

    def add(self, instance_id: str, reason: str, tokens: int, *, died: str = "") -> None:
        """An attempt on this instance was lost when the request had so many tokens. `died`: the incarnation
        that did, if one did."""
        if died:
            self.deaths += 1
            self._all_deaths += 1
            self.killed.append(died)
        else:
            self.failures += 1
        self._strike(f"{instance_id}: {reason}", tokens)

    def moved(self, instance_id: str, reason: str, tokens: int) -> None:
        """An attempt was taken away from an instance that stood still: suspicious, but no failure."""
        self.moves += 1
        self._strike(f"{instance_id}: {reason}", tokens)

    def survived(self, connected: Collection[str]) -> None:
        """These incarnations are connected: those among them that seemed to be dead had only lost their
        link."""
        dead = [incarnation for incarnation in self.killed if incarnation not in connected]
        self.failures += len(self.killed) - len(dead)
        self.killed, self.deaths = dead, len(dead)

    def acquit(self) -> None:
        """It made progress."""
        self.count = self.failures = self.moves = self.deaths = 0
        self.reasons.clear()
        self.killed.clear()

    def is_cause(self, max_deaths: int, *, alone: bool) -> bool:
        """Whether it is stopped as the cause of the deaths. `alone`: no other request with as many deaths
        was on the instance that died last."""
        return self.deaths >= (max_deaths if alone else MAX_DEATHS)

    def _strike(self, reason: str, tokens: int) -> None:
        self.count += 1
        self.lost += 1
        self.reasons.append(reason)
        self.acquitted_at = tokens + (ACQUIT_TOKENS << min(self._all_deaths, MOST_DOUBLINGS))


@dataclass(frozen=True, slots=True)
class Suspect:
    """Another request with strikes, and the instances that have it or will."""

    strikes: int
    instances: Collection[str]


def apart(strikes: int, cards: list[Card], others: Iterable[Suspect], *, held: bool) -> list[Card]:
    """Those of `cards` where a request with so many strikes may run; none that decodes: it has to wait.

    `held`: it has waited for `HOLD_S` already."""
    suspects: dict[str, int] = {}  # on each instance
    prime: dict[str, int] = {}
    for other in others:
        for instance_id in other.instances:
            suspects[instance_id] = suspects.get(instance_id, 0) + 1
            if other.strikes >= PRIME:
                prime[instance_id] = prime.get(instance_id, 0) + 1
    if strikes == 0:
        return _without(cards, prime) or cards
    if strikes < PRIME:
        return _fewest(cards, suspects)
    free = _without(cards, prime)
    if any(card.role.decodes for card in free):
        return free
    return _fewest(cards, prime) if held else []


def _without(cards: list[Card], counts: Mapping[str, int]) -> list[Card]:
    """Those with none; empty unless one of them decodes."""
    free = [card for card in cards if card.instance_id not in counts]
    return free if any(card.role.decodes for card in free) else []


def _fewest(cards: list[Card], counts: Mapping[str, int]) -> list[Card]:
    """Of those that decode and of the others, the ones with the fewest."""
    fewest = []
    for group in ([c for c in cards if c.role.decodes], [c for c in cards if not c.role.decodes]):
        least = min((counts.get(card.instance_id, 0) for card in group), default=0)
        fewest += [card for card in group if counts.get(card.instance_id, 0) == least]
    return fewest
