"""The models that the connected workers serve, with the files a frontend needs to speak for them.

Tokenizer and template come from the workers, named by content, so a frontend needs no model files and
cannot drift from its workers. All workers of one model must bring the same files: an instance that brings
others than those already serving is kept out, because its tokens would mean other text.
"""

from __future__ import annotations

import hashlib

from penstock.structs import Card, ModelView


class Catalog:
    """Model views by served name, and asset contents by sha256. Pure."""

    def __init__(self) -> None:
        self._assets: dict[str, bytes] = {}
        self._views: dict[str, ModelView] = {}
        self._published: dict[str, set[str]] = {}  # the sha256 of each view's assets

    def view(self, name: str) -> ModelView | None:
        """The model's view, also while nobody serves it; None when it was never seen."""
        return self._views.get(name)

    def views(self) -> list[ModelView]:
        return list(self._views.values())

    def wanted(self, card: Card) -> list[str]:
        """The sha256 of this card's assets that are not here yet."""
        return [sha256 for sha256 in card.assets.values() if sha256 not in self._assets]

    def put(self, sha256: str, content: bytes) -> None:
        self._assets[sha256] = content

    def agrees(self, card: Card) -> bool:
        """Whether the card is of the model that the view describes (or of a model not seen yet)."""
        view = self._views.get(card.model)
        return view is None or view.fingerprint == fingerprint(card)

    def publish(self, card: Card) -> None:
        """Make the card's model available, in place of what was there under its name. All its assets
        must be here (`wanted` is empty). What only the replaced view used is dropped."""
        self._views[card.model] = ModelView(
            name=card.model,
            max_model_len=card.max_model_len,
            vocab_size=card.vocab_size,
            eos_token_ids=card.eos_token_ids,
            sampling_defaults=card.sampling_defaults,
            assets={name: self._assets[sha256] for name, sha256 in card.assets.items()},
            fingerprint=fingerprint(card),
            structured_output=card.structured_output,
            tool_parser=card.tool_parser,
            reasoning_parser=card.reasoning_parser,
        )
        replaced = self._published.get(card.model, set())
        self._published[card.model] = set(card.assets.values())
        for sha256 in replaced.difference(*self._published.values()):
            del self._assets[sha256]


def fingerprint(card: Card) -> str:
    """Names everything that a prompt's rendering and checking depend on."""
    parts = [f"{name}={sha256}" for name, sha256 in sorted(card.assets.items())]
    parts += [str(card.max_model_len), str(card.vocab_size), str(sorted(card.eos_token_ids))]
    parts += [f"{name}={value}" for name, value in sorted(card.sampling_defaults.items())]
    parts += [str(card.structured_output), card.tool_parser, card.reasoning_parser]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
