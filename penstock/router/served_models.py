"""Which models clients can ask for, each in one revision (core/catalog.py), and when one is forgotten.

A model outlives its last worker for as long as a request may wait: whoever served it may be back before
that. When all of its workers have said that they leave, there is nothing to wait for.

A model has its own name, and perhaps aliases: all those that its workers give it, so that workers can be
replaced one by one by others with other aliases. Only clients use them.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

from penstock.core.catalog import Catalog, differences
from penstock.core.membership import Membership, State
from penstock.errors import Rejection, RequestRejected
from penstock.shapes import Card, ModelKey, ModelView

log = logging.getLogger("penstock.instances")

SWEEP_S = 1.0
"""Seconds between looks for models that nobody serves any more."""

MAX_GONE_MODELS = 1024
"""Names of models that were served once, which are unavailable to a client instead of unknown."""

MAX_NAMED_MODELS = 16
"""Served models that the error for an unknown one names."""


@dataclass(slots=True)
class _Served:
    """A model in the revision that new requests get."""

    view: ModelView
    card: Card  # of a worker that has it
    at: float  # when somebody was last seen to serve it
    aliases: list[str] = field(default_factory=list)


class ServedModels:
    """Follows a membership. `now` in seconds.

    Args:
        outage_s: how long a request may wait for a worker.
        has_left: whether an instance has said goodbye, or has no link.
    """

    def __init__(
        self, membership: Membership, catalog: Catalog, outage_s: float, has_left: Callable[[str], bool]
    ) -> None:
        self._membership = membership
        self._catalog = catalog
        self._outage_s = outage_s
        self._has_left = has_left
        self.listed = False  # discovery has said who exists
        self._served: dict[str, _Served] = {}  # by model
        self._aliased: dict[str, str] = {}  # alias -> model
        self._ambiguous: set[str] = set()  # aliases that another model has too, as its own name or alias
        self._gone: OrderedDict[str, None] = OrderedDict()  # names that were served once, latest last
        self._lost: dict[str, tuple[str, float]] = {}  # instance -> its model, and when it was lost
        self._swept_at = 0.0

    def models(self) -> dict[str, ModelView]:
        """Models that can be served, by each of their names; a model's own name is before its aliases."""
        servable = self._servable()
        return {
            name: served.view
            for model, served in self._served.items()
            if model in servable
            for name in (model, *served.aliases)
            if self._aliased.get(name, name) == model
        }

    def model(self, name: str) -> ModelView:
        """The model in the revision that new requests get.

        Raises RequestRejected: NOT_FOUND for a model that no worker serves or served, where there are
        workers; UNAVAILABLE while there are none, for a model whose first workers are still connecting,
        whose workers have all said that they leave, or that no worker has served for `outage_s`.
        """
        model = self._aliased.get(name, name)
        served = self._served.get(model)
        if served is not None and not self._all_left(model):
            return served.view
        if served is not None or name in self._gone:
            raise RequestRejected(
                f"No worker serves `{name}` right now.",
                kind=Rejection.UNAVAILABLE,
                code="no_worker",
                retry_after_s=5.0,
            )
        members = self._membership.members.values()
        connecting = any(name in member.names or not member.model for member in members)
        if not self.listed or not members or connecting:  # nobody may be there while a whole graph starts
            message = f"No worker serves `{name}` yet."
            raise RequestRejected(message, kind=Rejection.UNAVAILABLE, code="no_worker", retry_after_s=1.0)
        names = ", ".join(f"`{served}`" for served in islice(self.models(), MAX_NAMED_MODELS))
        message = f"The model `{name}` does not exist; served: {names or 'none'}."
        raise RequestRejected(message, kind=Rejection.NOT_FOUND, code="model_not_found", field="model")

    def serves(self, name: str) -> bool:
        """Whether new requests may come for the model: it is served, or was so recently enough for requests
        to wait."""
        return name in self._served

    def serves_revision(self, model: ModelKey) -> bool:
        """The same, and whether they get this revision of it."""
        served = self._served.get(model.name)
        return served is not None and served.view.key == model

    def other_revision(self, card: Card) -> str:
        """What keeps new requests from a worker of another revision than the served one."""
        served = self._served.get(card.model.name)
        differing = ", ".join(differences(card, served.card)) if served is not None else ""
        return f"another revision of {card.model.name} is served, with other {differing}"

    def elect(self, now: float) -> list[str]:
        """After any change of a member: see which revision of each model new requests get. Returns the
        models for which that is another one than before."""
        replaced = []
        for model in self._membership.elect():
            revision = self._membership.served.get(model)
            before = self._served.get(model)
            view = self._catalog.view(ModelKey(model, revision)) if revision is not None else None
            if view is None or (before is not None and before.view.revision == revision):
                continue  # nobody serves it, or the same revision again
            cards = self._membership.ready(view.key)
            self._served[model] = _Served(view, next(card for card in cards if card.role.decodes), now)
            self._gone.pop(model, None)
            if before is not None:
                words = "model %s: new requests go to revision %s instead of %s"
                log.info(words, model, revision, before.view.revision)
                replaced.append(model)
        self._find_aliases()
        return replaced

    def _find_aliases(self) -> None:
        """See which model each alias stands for. Those of a model whose workers are all away stay."""
        found: dict[str, list[str]] = {}
        for member in self._membership.members.values():
            if member.servable and member.registration.role.decodes:
                found.setdefault(member.model, []).extend(member.aliases)
        self._aliased, ambiguous = {}, set()
        # Models with workers first, then by name, so that all frontends come to the same result.
        for model in sorted(self._served, key=lambda model: (model not in found, model)):
            served = self._served[model]
            served.aliases = list(dict.fromkeys(found.get(model, served.aliases)))
            for alias in served.aliases:
                if alias in self._served or alias in self._aliased:
                    ambiguous.add(alias)
                else:
                    self._aliased[alias] = model
        for alias in ambiguous - self._ambiguous:
            taker = self._aliased.get(alias, alias)
            log.warning("several models have the name %s: requests for it go to %s", alias, taker)
        self._ambiguous = ambiguous

    def lost(self, instance_id: str, model: str, now: float) -> None:
        """An instance that decodes is gone without a word, and may be back."""
        self._lost[instance_id] = (model, now)

    def found(self, instance_id: str) -> None:
        """An instance is up, for the first time or again."""
        self._lost.pop(instance_id, None)

    def tick(self, now: float) -> None:
        """Let go of models, and of revisions, that nobody has any more."""
        if now - self._swept_at < SWEEP_S:
            return
        self._swept_at = now
        self._lost = {name: lost for name, lost in self._lost.items() if now - lost[1] <= self._outage_s}
        servable = self._servable()
        for model, served in list(self._served.items()):
            if model in servable:
                served.at = now
            elif now - served.at > self._outage_s:
                del self._served[model]
                self._gone |= dict.fromkeys((model, *served.aliases))
                self._find_aliases()
                log.info("model %s: forgotten, as no worker has served it for %g s", model, self._outage_s)
        while len(self._gone) > MAX_GONE_MODELS:
            self._gone.popitem(last=False)
        members = self._membership.members.values()
        cards = {
            ModelKey(member.card.model.name, member.revision): member.card
            for member in members
            if member.card
        }
        cards |= {served.view.key: served.card for served in self._served.values()}
        self._catalog.keep(cards)

    def _servable(self) -> set[str]:
        members = self._membership.members.values()
        return {member.model for member in members if member.servable}

    def _all_left(self, model: str) -> bool:
        """Whether each worker that could end a request of this model has said that it leaves, so that none
        of them will be back."""
        if any(lost_model == model for lost_model, _ in self._lost.values()):
            return False
        for instance_id, member in self._membership.members.items():  # nearly always the first one stays
            counts = member.model in (model, "") and member.registration.role.decodes
            if counts and member.state is not State.DRAINING and not self._has_left(instance_id):
                return False
        return True
