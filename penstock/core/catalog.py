"""The models that the connected workers serve, with the files a frontend needs to speak for them.

Tokenizer and template come from the workers, named by content, so a frontend needs no model files and
cannot drift from its workers. Two workers may serve different files under one name, by mistake or while a
model is being replaced. Their tokens mean different text, so each set of files and limits is a *revision*
of the model, and a request runs only on workers of the revision that it was tokenized for
(core/membership.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec.structs import asdict, replace

from penstock.shapes import Answering, Card, ModelCard, ModelKey, ModelView

_encoder = msgspec.json.Encoder(order="deterministic")  # equal cards are equal bytes


class Catalog:
    """Model views, and the contents of their files by sha256. Pure."""

    def __init__(self) -> None:
        self._assets: dict[str, bytes] = {}
        self._views: dict[ModelKey, ModelView] = {}

    def view(self, key: ModelKey) -> ModelView | None:
        """The view of one revision of a model; None when it is not here."""
        return self._views.get(key)

    def wanted(self, card: Card) -> list[str]:
        """The sha256 of this card's assets that are not here yet."""
        return [sha256 for sha256 in card.model.assets.values() if sha256 not in self._assets]

    def put(self, sha256: str, content: bytes) -> None:
        self._assets[sha256] = content

    def publish(self, card: Card) -> ModelView:
        """Make the view of the card's model and revision. All its assets must be here (`wanted`)."""
        files = {name: self._assets[sha256] for name, sha256 in card.model.assets.items()}
        view = ModelView(card.model, revision_of(card), files)
        self._views[view.key] = view
        return view

    def keep(self, cards: Mapping[ModelKey, Card]) -> None:
        """Drop all views and files but those of these cards."""
        files = {sha256 for card in cards.values() for sha256 in card.model.assets.values()}
        self._views = {key: view for key, view in self._views.items() if key in cards}
        self._assets = {sha256: content for sha256, content in self._assets.items() if sha256 in files}


def revision_of(card: Card) -> str:
    """Names everything about a worker's model that an answer depends on: `model.answering`, each of them 12
    hex digits. Prefill workers need not know how answers are drawn and read, and have only the first."""
    digests = [_digest(replace(card.model, answering=Answering()))]
    if card.role.decodes:
        digests.append(_digest(card.model.answering))
    return ".".join(digests)


def serves(worker: str, revision: str) -> bool:
    """Whether a worker of the first revision computes requests that were tokenized for the second."""
    return revision == worker or revision.startswith(f"{worker}.")


def differences(card: Card, other: Card) -> list[str]:
    """What makes the models of two cards different revisions, by the names of fields and files."""
    answering = card.role.decodes and other.role.decodes
    ours, theirs = _parts(card.model, answering), _parts(other.model, answering)
    return [name for name in ours | theirs if ours.get(name) != theirs.get(name)]


def _digest(part: ModelCard | Answering) -> str:
    return hashlib.sha256(_encoder.encode(part)).hexdigest()[:12]


def _parts(model: ModelCard, answering: bool) -> dict[str, Any]:
    fields = asdict(model)
    del fields["answering"], fields["assets"]
    return {**model.assets, **fields, **(asdict(model.answering) if answering else {})}
