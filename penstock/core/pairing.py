"""Which prefill worker may compute a prompt for which decode worker.

A decode worker refuses KV that it could not read as its own, and computes the prompt again: correct, but
the prefill worker's time is lost. It compares the handoff with itself, and a handoff says what the card of
the worker that made it said (engines/active.py). So frontends know beforehand who would refuse whom.

Workers of one revision of a model (core/catalog.py) differ in this while they are replaced by others with
another block size, dtype or engine version. Both generations serve side by side, and KV moves only within
each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

from penstock.shapes import Card, EngineCard, Role


class KvFormat(NamedTuple):
    """What must be equal for one worker to read the KV of another. The fields are those of EngineCard and
    Handoff."""

    block_size: int = 0
    layout: str = ""
    transport: str = ""


class SaysFormat(Protocol):
    """An EngineCard or a Handoff."""

    @property
    def block_size(self) -> int: ...
    @property
    def layout(self) -> str: ...
    @property
    def transport(self) -> str: ...


def kv_format(it: SaysFormat) -> KvFormat:
    """Of the KV that a worker makes and reads, or that a handoff is for."""
    return KvFormat(it.block_size, it.layout, it.transport)


_PARTNER = {Role.PREFILL: Role.DECODE, Role.DECODE: Role.PREFILL}
_UNPAIRED = {
    Role.PREFILL: "no decode worker reads its KV",
    Role.DECODE: "it reads the KV of no prefill worker",
}


def unpaired(cards: Iterable[Card]) -> dict[str, str]:
    """Those of these workers that have no partner among them, and why, by instance id: prefill workers
    whose KV no decode worker reads, and decode workers that read the KV of no prefill worker. Where a model
    has no workers of the other role at all, nobody counts as unpaired."""
    formats: dict[tuple[str, Role], dict[KvFormat, EngineCard]] = {}
    cards = list(cards)
    for card in cards:
        formats.setdefault((card.model.name, card.role), {}).setdefault(kv_format(card.engine), card.engine)
    reasons = {}
    for card in cards:
        theirs = formats.get((card.model.name, _PARTNER.get(card.role, card.role)), {})
        if theirs and kv_format(card.engine) not in theirs:
            why = min((_difference(card.engine, other) for other in theirs.values()), key=len)
            reasons[card.instance_id] = f"{_UNPAIRED[card.role]}: {why}"
    return reasons


def without_pairs(cards: Iterable[Card], alone: Mapping[str, str]) -> dict[str, str]:
    """The models of which there are prefill workers, and all of them are unpaired (`alone`), so that decode
    workers compute every prompt; each with the reason of one of them."""
    prefills: dict[str, list[str]] = {}
    for card in cards:
        if card.role is Role.PREFILL:
            prefills.setdefault(card.model.name, []).append(alone.get(card.instance_id, ""))
    return {model: reasons[0] for model, reasons in prefills.items() if all(reasons)}


def _difference(engine: EngineCard, other: EngineCard) -> str:
    """Why they cannot read each other's KV, in words. The layout is a digest that people cannot read: it
    stands for itself only where nothing else tells the two apart."""
    compared = {
        "block_size": (engine.block_size, other.block_size),
        "transport": (engine.transport, other.transport),
        "engine": (engine.name, other.name),
    }
    told = [
        f"{name} is {our!r}, theirs {their!r}" for name, (our, their) in compared.items() if our != their
    ]
    return ", ".join(told) or f"layout is {engine.layout!r}, theirs {other.layout!r}"
