"""Which requests may be killing engines.

Theory. Some requests kill the engine that computes them. Retried without thought, one takes down every
worker; and all that shared an engine with it lose as many attempts as it does, so counting attempts alone
would fail them with it. Nobody can tell them apart after one death. But the cause is in every death, and
the others need not be: every request that lost attempts is a suspect, and suspects are kept apart.

    strikes  where the next attempt may run
    -------  ------------------------------------------------------------------------------------
    0        anywhere, but rather not beside a prime suspect
    1        beside as few suspects as possible
    2, more  (a prime suspect) not beside another one; it waits for such a place, for `HOLD_S` at most,
             then beside as few as possible

So the second death leaves a few prime suspects, the third has one of them at most, and that is the cause:
it is stopped, and named. Progress beyond the point where the attempts were lost acquits; it must be
longer with every death, so that a request that kills late is found as well.

A frontend knows nothing of the requests that other frontends have on a worker but their number. When there
were any on one of the workers that died, the cause may be among them: a request is stopped then only after
`MAX_DEATHS`.

Strikes are attempts lost in any way (deaths, errors, deadlines, standing still): what kills an engine may
also hang it, or fail its batch. Only deaths make a request the cause of one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from penstock.shapes import Card, Incarnation

PRIME = 2
"""Strikes that make a prime suspect."""

HOLD_S = 5.0
"""How long a prime suspect waits for a place of its own. When hundreds of requests lost two attempts each
(two machines failed under load), there are not so many places; then the next death divides them."""

ACQUIT_TOKENS = 8
"""Progress that acquits of a strike; doubles with each of the first deaths."""

MOST_DOUBLINGS = 5
"""A long request in a long outage sees many deaths that are not its own."""

MAX_DEATHS = 6
"""Deaths in a row without progress that no request survives, whoever else was there each time: there may be
too many suspects for the places."""


@dataclass(slots=True)
class Strikes:
    """What happened to one request's attempts since it last made progress."""

    count: int = 0
    failures: int = 0  # attempts that ended badly while their instance lived on, or was only silent
    moves: int = 0  # attempts taken away from an instance that stood still
    deaths: int = 0  # of the instance under an attempt
    shared: bool = False  # one of those instances had work of other frontends
    acquitted_at: int = 0  # tokens of prompt and output that are progress
    reasons: list[str] = field(default_factory=list)
    killed: list[Incarnation] = field(default_factory=list)  # those that died under it
    lost: int = 0  # attempts, whatever came after them
    _all_deaths: int = 0

    def add(self, instance_id: str, reason: str, tokens: int, *, died: Incarnation | None = None) -> None:
        """An attempt on this instance was lost when the request had so many tokens. `died`: the incarnation
        that did, if one did."""
        if died is not None:
            self.deaths += 1
            self._all_deaths += 1
            self.killed.append(died)
        else:
            self.failures += 1
        self._strike(f"{instance_id}: {reason}", tokens)

    def describe(self) -> str:
        """The deaths, for the log."""
        return f"deaths={self.deaths} instances={','.join(map(str, self.killed))}"

    def moved(self, instance_id: str, reason: str, tokens: int) -> None:
        """An attempt was taken away from an instance that stood still: suspicious, but no failure."""
        self.moves += 1
        self._strike(f"{instance_id}: {reason}", tokens)

    def survived(self, connected: Collection[Incarnation]) -> None:
        """These incarnations are connected: those among them that seemed to be dead had only lost their
        link."""
        dead = [incarnation for incarnation in self.killed if incarnation not in connected]
        self.failures += len(self.killed) - len(dead)
        self.killed, self.deaths = dead, len(dead)

    def acquit(self) -> None:
        """It made progress."""
        self.count = self.failures = self.moves = self.deaths = 0
        self.shared = False
        self.reasons.clear()
        self.killed.clear()

    def is_cause(self, max_deaths: int, *, alone: bool) -> bool:
        """Whether it is stopped as the cause of the deaths. `alone`: no other request of this frontend with
        as many deaths was on the instance that died last."""
        return self.deaths >= (max_deaths if alone and not self.shared else MAX_DEATHS)

    def _strike(self, reason: str, tokens: int) -> None:
        self.count += 1
        self.lost += 1
        self.reasons.append(reason)
        self.acquitted_at = tokens + (ACQUIT_TOKENS << min(self._all_deaths, MOST_DOUBLINGS))


class Suspects:
    """Which requests have strikes, and which instances have those requests or will. They are
    counted as they come and go: after a death there may be a thousand, and each of them needs a place."""

    def __init__(self) -> None:
        self._noted: dict[str, tuple[bool, set[str]]] = {}  # by request id: whether prime, and where
        self._any: Counter[str] = Counter()  # on each instance; only where there are some
        self._prime: Counter[str] = Counter()

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._noted

    def note(self, request_id: str, strikes: int, *instances: str) -> None:
        """A request has so many strikes now, and these instances have it or will; empty names are none."""
        before = self._noted.pop(request_id, None)
        if before is not None:
            self._count(*before, -1)
        places = {*instances} - {""}
        if strikes and places:
            self._noted[request_id] = noted = strikes >= PRIME, places
            self._count(*noted, 1)

    def apart(self, strikes: int, cards: list[Card], *, held: bool = False) -> list[Card]:
        """Those of `cards` where a request with so many strikes may run, which has no instance now; none
        that decodes: it has to wait. `held`: it has waited for `HOLD_S` already."""
        if strikes == 0:
            return (_without(cards, self._prime) or cards) if self._prime else cards
        if strikes < PRIME:
            return _fewest(cards, self._any)
        return _without(cards, self._prime) or (_fewest(cards, self._prime) if held else [])

    def _count(self, prime: bool, instances: set[str], change: int) -> None:
        for counts in (self._any, self._prime) if prime else (self._any,):
            for instance_id in instances:
                counts[instance_id] += change
                if not counts[instance_id]:
                    del counts[instance_id]


def alone_from(deaths: Collection[int]) -> int:
    """How many deaths a request must have seen to be the only one with as many on an instance that died.
    `deaths`: before, of each of this frontend's requests that were on it."""
    second = sorted(deaths, reverse=True)[1:2]
    return second[0] + 1 if second else 0


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
