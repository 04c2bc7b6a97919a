"""Which instances there are, and what may be sent to each.

Two sources, with unequal rights. Discovery says who exists: it only causes connecting and, once the link
is down as well, forgetting. The link says who lives: an instance takes part exactly while its link is up.
So when discovery goes away or forgets a lease, what is connected keeps serving.

    state        entered when                                      takes new attempts
    ----------   ------------------------------------------------  ------------------
    CONNECTING   discovered, or the link went down                 no
    LOADING      link up, the tokenizer is still being fetched     no
    READY        all it needs is here                              yes
    STANDBY      the same, but new requests go to another          of its own revision
                 revision of its model
    QUARANTINED  its engine is stuck (core/progress.py)            no
    DRAINING     the worker said so                                no

A QUARANTINED instance is READY again once its engine advances. One that is LOADING or DRAINING meanwhile
keeps that state; its engine is stuck all the same.

A model is served in one revision at a time (core/catalog.py): the one that most of its loaded decode
workers have; among equals, that of the oldest worker. All frontends that see the same workers choose the
same one. So while the workers of a model are replaced by others, its new requests change over once, when
more than half of the workers are new. A request stays with the revision that it was tokenized for while
that has workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from penstock.core.catalog import revision_of, serves
from penstock.shapes import Card, Incarnation, ModelKey, Registration, Role


class State(StrEnum):
    CONNECTING = "connecting"
    LOADING = "loading"
    READY = "ready"
    STANDBY = "standby"
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
    model: str  # its own name, by its latest card; empty as long as nobody knows
    state: State = State.CONNECTING
    card: Card | None = None  # None until the link is up
    revision: str = ""  # of its model, by its latest card; empty before the first
    listed: bool = True  # discovery still knows it
    aliases: Sequence[str] = ()  # of the model, likewise
    stuck: str = ""  # how long its engine stands still already; empty while it advances

    @property
    def names(self) -> tuple[str, ...]:
        """All names of its model, for clients."""
        return (self.model, *self.aliases)

    @property
    def servable(self) -> bool:
        """It takes new requests, or will once its engine goes on: they may wait for that."""
        return self.state in (State.READY, State.QUARANTINED)

    @property
    def loaded(self) -> bool:
        """All it needs is here, and its engine advances."""
        return self.state in (State.READY, State.STANDBY)

    @property
    def up(self) -> bool:
        return self.state is not State.CONNECTING


class Membership:
    """The members by instance id. Pure; the router carries out the effects."""

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        self.served: dict[str, str] = {}  # by model: the revision of it that new requests get
        self._ready: dict[ModelKey, tuple[list[Card], int]] = {}  # until a member changes

    def discovered(self, current: Mapping[str, Registration]) -> list[Connect | Disconnect]:
        """Take discovery's whole set. A new epoch, process or address replaces the old incarnation."""
        self._ready.clear()
        effects: list[Connect | Disconnect] = []
        for instance_id, member in list(self.members.items()):
            found = current.get(instance_id)
            member.listed = found is not None
            if found is not None and (found == member.registration or _is_connected(member, found)):
                member.registration = found
            elif found is not None or not member.up:
                del self.members[instance_id]
                effects.append(Disconnect(instance_id))
        for instance_id, registration in current.items():
            if instance_id not in self.members:
                self.members[instance_id] = Member(
                    registration, registration.model, aliases=registration.aliases
                )
                effects.append(Connect(registration))
        return effects

    def up(self, instance_id: str, card: Card) -> None:
        """The link is up and the snapshot is in."""
        self._ready.clear()
        member = self.members[instance_id]
        member.card = card
        member.model, member.aliases = card.model.name, card.aliases
        member.revision = revision_of(card)
        member.state = State.LOADING

    def loaded(self, instance_id: str) -> None:
        """Everything the instance's model needs is here."""
        self._ready.clear()
        member = self.members.get(instance_id)
        if member is not None and member.state is State.LOADING:
            member.state = State.QUARANTINED if member.stuck else State.READY

    def stuck(self, instance_id: str, reason: str) -> None:
        """Its engine does not advance, although it has work."""
        self._ready.clear()
        member = self.members[instance_id]
        member.stuck = reason
        if member.loaded:
            member.state = State.QUARANTINED

    def advancing(self, instance_id: str) -> None:
        """Its engine advances again."""
        self._ready.clear()
        member = self.members[instance_id]
        member.stuck = ""
        if member.state is State.QUARANTINED:
            member.state = State.READY

    def draining(self, instance_id: str) -> None:
        self._ready.clear()
        member = self.members.get(instance_id)
        if member is not None and member.up:
            member.state = State.DRAINING

    def down(self, instance_id: str) -> list[Connect | Disconnect]:
        """The link is down. An instance that discovery no longer lists is forgotten."""
        self._ready.clear()
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

    def elect(self) -> list[str]:
        """Decide which revision of each model new requests get, after any of the above. Returns the models
        for which that changed."""
        self._ready.clear()
        before, self.served = self.served, {}
        members = self.members.values()
        loaded = [(member, member.card) for member in members if member.loaded and member.card]
        decoders: dict[str, dict[str, list[Card]]] = {}
        for member, card in loaded:
            if card.role.decodes:
                decoders.setdefault(card.model.name, {}).setdefault(member.revision, []).append(card)
        for model, revisions in decoders.items():
            self.served[model] = max(revisions, key=lambda revision: _claim(revision, revisions[revision]))
        for member, card in loaded:
            served = self.served.get(card.model.name)
            stands_by = served is not None and not serves(member.revision, served)
            member.state = State.STANDBY if stands_by else State.READY
        return [model for model in before | self.served if before.get(model) != self.served.get(model)]

    def ready(self, model: ModelKey) -> list[Card]:
        """Who may get a new attempt of a request that was tokenized for this revision of the model. It is
        the same list until a member changes, and the caller must not change it."""
        return self._ready_of(model)[0]

    def decoders(self, model: ModelKey) -> int:
        """How many of these decode."""
        return self._ready_of(model)[1]

    def _ready_of(self, model: ModelKey) -> tuple[list[Card], int]:
        found = self._ready.get(model)
        if found is None:
            cards = [card for it in self.members if (card := self.ready_card(model, it)) is not None]
            found = self._ready[model] = cards, decoders(cards)
        return found

    def ready_card(self, model: ModelKey, instance_id: str) -> Card | None:
        """Of this instance, if it is one of those that `ready` has."""
        member = self.members.get(instance_id)
        if member is None or member.card is None or not member.loaded:
            return None
        same = member.card.model.name == model.name and serves(member.revision, model.revision)
        return member.card if same else None

    def replaced(self, model: ModelKey) -> bool:
        """Whether new requests for the model go to another revision than this one."""
        return self.served.get(model.name, model.revision) != model.revision

    def may_return(self, model: ModelKey) -> bool:
        """Whether an instance that takes no attempts now may decode for this revision soon: it has it, or
        it has not said yet what it has."""
        return any(
            member.model in (model.name, "")
            and member.state in (State.CONNECTING, State.LOADING, State.QUARANTINED)
            and member.registration.role.decodes
            and (not member.revision or member.revision == model.revision)
            for member in self.members.values()
        )

    def incarnations(self) -> set[Incarnation]:
        """The processes that are connected."""
        return {member.card.incarnation for member in self.members.values() if member.up and member.card}

    def ready_cards(self) -> list[Card]:
        """Who may get new requests."""
        return [
            member.card
            for member in self.members.values()
            if member.state is State.READY and member.card is not None
        ]

    def missing(self, expected: Iterable[Role]) -> list[Role]:
        """The roles without a loaded instance; with none expected, something must be able to decode."""
        ready = {member.card.role for member in self.members.values() if member.loaded and member.card}
        expected = list(expected)
        if not expected:
            return [] if any(role.decodes for role in ready) else [Role.DECODE]
        return [role for role in expected if role not in ready]


def _is_connected(member: Member, found: Registration) -> bool:
    """Whether a registration only says late what the link has said already: a restarted container is
    connected again before Kubernetes has told of its restart."""
    same = found.address == member.registration.address and found.role == member.registration.role
    return same and found.epoch == 0 and member.card is not None and found.describes(member.card)


def _claim(revision: str, decoders: list[Card]) -> tuple[int, int, str]:
    """The largest claim is served: most decode workers; among equals, the oldest one."""
    return len(decoders), -min(card.incarnation.epoch for card in decoders), revision


def decoders(cards: Iterable[Card]) -> int:
    """How many of them decode."""
    return sum(card.role.decodes for card in cards)
