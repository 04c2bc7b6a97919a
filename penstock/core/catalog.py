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

from penstock.shapes import Card, ModelView


class Catalog:
    """Model views by name and revision, and the contents of their files by sha256. Pure."""

    def __init__(self) -> None:
        self._assets: dict[str, bytes] = {}
        self._views: dict[tuple[str, str], ModelView] = {}

    def view(self, name: str, revision: str) -> ModelView | None:
        """The view of one revision of a model; None when it is not here."""
        return self._views.get((name, revision))

    def wanted(self, card: Card) -> list[str]:
        """The sha256 of this card's assets that are not here yet."""
        return [sha256 for sha256 in card.assets.values() if sha256 not in self._assets]

    def put(self, sha256: str, content: bytes) -> None:
        self._assets[sha256] = content

    def publish(self, card: Card) -> ModelView:
        """Make the view of the card's model and revision. All its assets must be here (`wanted`)."""
        revision = revision_of(card)
        view = self._views[card.model, revision] = ModelView(
            name=card.model,
            revision=revision,
            max_model_len=card.max_model_len,
            vocab_size=card.vocab_size,
            eos_token_ids=card.eos_token_ids,
            sampling_defaults=card.sampling_defaults,
            assets={name: self._assets[sha256] for name, sha256 in card.assets.items()},
            structured_output=card.structured_output,
            tool_parser=card.tool_parser,
            reasoning_parser=card.reasoning_parser,
        )
        return view

    def keep(self, cards: Mapping[tuple[str, str], Card]) -> None:
        """Drop all views and files but those of these cards, which are given by model and revision."""
        files = {sha256 for card in cards.values() for sha256 in card.assets.values()}
        self._views = {key: view for key, view in self._views.items() if key in cards}
        self._assets = {sha256: content for sha256, content in self._assets.items() if sha256 in files}


def revision_of(card: Card) -> str:
    """Names everything about a worker's model that an answer depends on: `model.answering`, each of them 12
    hex digits. Prefill workers need not be told how answers are drawn and read, and have only the first."""
    names = [_digest(_model(card))]
    if card.role.decodes:
        names.append(_digest(_answering(card)))
    return ".".join(names)


def serves(worker: str, revision: str) -> bool:
    """Whether a worker of the first revision computes requests that were tokenized for the second."""
    return revision == worker or revision.startswith(f"{worker}.")


def differences(card: Card, other: Card) -> list[str]:
    """What makes the models of two cards different revisions, by name."""
    ours, theirs = _model(card), _model(other)
    if card.role.decodes and other.role.decodes:
        ours, theirs = ours | _answering(card), theirs | _answering(other)
    return [name for name in ours | theirs if ours.get(name) != theirs.get(name)]


def _digest(parts: dict[str, str]) -> str:
    text = "\n".join(f"{name}={value}" for name, value in parts.items())
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _model(card: Card) -> dict[str, str]:
    """What token ids and their KV mean, and which of them fit."""
    return {
        **{name: card.assets[name] for name in sorted(card.assets)},
        "weights": card.weights,
        "max_model_len": str(card.max_model_len),
        "vocab_size": str(card.vocab_size),
        "eos_token_ids": str(sorted(card.eos_token_ids)),
    }


def _answering(card: Card) -> dict[str, str]:
    """How answers are drawn and read."""
    return {
        "sampling_defaults": str(sorted(card.sampling_defaults.items())),
        "structured_output": str(card.structured_output),
        "tool_parser": card.tool_parser,
        "reasoning_parser": card.reasoning_parser,
    }
