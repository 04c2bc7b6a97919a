"""Which instances there are, and what may be sent to each.

Two sources, with unequal rights. Discovery says who exists: it only causes connecting and, once the link
is down as well, forgetting. The link says who lives: an instance takes part exactly while its link is up.
So when discovery goes away or forgets a lease, what is connected keeps serving.

    state        entered when                                      takes new attempts
    ----------   ------------------------------------------------  ------------------
    CONNECTING   discovered, or the link went down                 no
    LOADING      link up, the tokenizer is still being fetched     no
    READY        all it needs is here                              yes
    QUARANTINED  its engine is stuck (core/progress.py)            no
    DRAINING     the worker said so                                no

A QUARANTINED instance is READY again once its engine advances. One that is LOADING or DRAINING meanwhile
keeps that state; its engine is stuck all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from penstock.structs import Card, Registration, Role


class State(StrEnum):
    CONNECTING = "connecting"
    LOADING = "loading"
    READY = "ready"
    QUARANTINED = "quarantined"
    DRAINING = "draining"


class Connect(msgspec.Struct):
    """Effect: open a link to this registration and keep it open."""

    registration: Registration


class Disconnect(msgspec.Struct):
    """Effect: close the link of this instance and stop trying."""

    instance_id: str


@dataclass(slots=True)
class Member:
    registration: Registration
    state: State = State.CONNECTING
    card: Card | None = None  # None until the link is up
    listed: bool = True  # discovery still knows it
    stuck: str = ""  # how long its engine stands still already; empty while it advances

    @property
    def servable(self) -> bool:
        """It takes requests, or will once its engine goes on: they may wait for that."""
        return self.state in (State.READY, State.QUARANTINED)

    @property
    def up(self) -> bool:
        return self.state is not State.CONNECTING


class Membership:
    """The members by instance id. Pure; the router carries out the effects."""

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}

    def discovered(self, current: Mapping[str, Registration]) -> list[Connect | Disconnect]:
        """Take discovery's whole set. A new epoch or address replaces the old incarnation."""
        effects: list[Connect | Disconnect] = []
        for instance_id, member in list(self.members.items()):
            found = current.get(instance_id)
            member.listed = found is not None
            replaced = found is not None and found != member.registration
            if replaced or (found is None and not member.up):
                del self.members[instance_id]
                effects.append(Disconnect(instance_id))
        for instance_id, registration in current.items():
            if instance_id not in self.members:
                self.members[instance_id] = Member(registration)
                effects.append(Connect(registration))
        return effects

    def up(self, instance_id: str, card: Card) -> None:
        """The link is up and the snapshot is in."""
        member = self.members[instance_id]
        member.card = card
        member.state = State.LOADING

    def loaded(self, instance_id: str) -> None:
        """Everything the instance's model needs is here."""
        member = self.members.get(instance_id)
        if member is not None and member.state is State.LOADING:
            member.state = State.QUARANTINED if member.stuck else State.READY

    def stuck(self, instance_id: str, reason: str) -> None:
        """Its engine does not advance, although it has work."""
        member = self.members[instance_id]
        member.stuck = reason
        if member.state is State.READY:
            member.state = State.QUARANTINED

    def advancing(self, instance_id: str) -> None:
        """Its engine advances again."""
        member = self.members[instance_id]
        member.stuck = ""
        if member.state is State.QUARANTINED:
            member.state = State.READY

    def draining(self, instance_id: str) -> None:
        member = self.members.get(instance_id)
        if member is not None and member.up:
            member.state = State.DRAINING

    def down(self, instance_id: str) -> list[Connect | Disconnect]:
        """The link is down. An instance that discovery no longer lists is forgotten."""
        member = self.members.get(instance_id)
        if member is None:
            return []
        member.state = State.CONNECTING
        member.card = None
        member.stuck = ""
        if member.listed:
            return []
        del self.members[instance_id]
        return [Disconnect(instance_id)]

    def ready(self, model: str) -> list[Card]:
        """Who may get a new attempt for this model."""
        return [card for card in self.ready_cards() if card.model == model]

    def incarnations(self) -> set[str]:
        """The processes that are connected."""
        return {member.registration.incarnation for member in self.members.values() if member.up}

    def ready_cards(self) -> list[Card]:
        """Who may get new attempts."""
        return [
            member.card
            for member in self.members.values()
            if member.state is State.READY and member.card is not None
        ]

    def missing(self, expected: Iterable[Role]) -> list[Role]:
        """The roles without a ready instance; with none expected, something must be able to decode."""
        ready = {card.role for card in self.ready_cards()}
        expected = list(expected)
        if not expected:
            return [] if any(role.decodes for role in ready) else [Role.DECODE]
        return [role for role in expected if role not in ready]


def decoders(cards: Iterable[Card]) -> int:
    """How many of them decode."""
    return sum(card.role.decodes for card in cards)
