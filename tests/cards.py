"""Cards for tests, in one line each."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from penstock.shapes import Card, EngineCard, Incarnation, ModelCard, ModelView, Role

T = TypeVar("T", Card, EngineCard, ModelCard, ModelView)

MODEL = ModelCard("m", max_model_len=4096, vocab_size=1000)
ENGINE = EngineCard("e", MODEL, block_size=16, total_blocks=100)


def card(instance_id: str = "w1", role: Role = Role.DECODE, *, epoch: int = 1, **fields: Any) -> Card:
    """A worker's card; `fields` as in `changed`."""
    return changed(Card(Incarnation(instance_id, epoch), role, ENGINE), **fields)


def changed(it: T, **fields: Any) -> T:
    """A card with other values in these fields of it and of the cards in it. `engine` and `model` are the
    names of those."""
    changes = dict(fields)
    it = _changed(it, changes)
    assert not changes, f"no fields of {type(it).__name__}: {sorted(changes)}"
    return it


def _changed(it: Any, changes: dict[str, Any]) -> Any:
    values = {}
    for name in it.__struct_fields__:
        key = _NAMES.get((type(it), name), name)
        if key in changes and not isinstance(getattr(it, name), msgspec.Struct):
            values[name] = changes.pop(key)
    for name in it.__struct_fields__:
        if isinstance(getattr(it, name), msgspec.Struct):
            values[name] = _changed(getattr(it, name), changes)
    return msgspec.structs.replace(it, **values)


_NAMES = {(EngineCard, "name"): "engine", (ModelCard, "name"): "model"}
