"""Who reads whose KV, and what people are told of those who have no partner."""

from __future__ import annotations

import msgspec
import pytest

from penstock.core.pairing import KvFormat, kv_format, unpaired, without_pairs
from penstock.engines.active import mismatch
from penstock.shapes import Attempt, Card, Role, Sampling
from tests import builders, cards

P, D, A = Role.PREFILL, Role.DECODE, Role.AGGREGATED


def card(instance_id: str, role: Role, block_size: int = 16, layout: str = "l", **changes: object) -> Card:
    fields = {"engine": "e 1", "block_size": block_size, "layout": layout, "transport": "tcp", **changes}
    return cards.card(instance_id, role, **fields)


OLD_P, OLD_D, NEW_P, NEW_D = card("p0", P), card("d0", D), card("p1", P, 32), card("d1", D, 32)


@pytest.mark.parametrize("field", KvFormat._fields)
def test_engines_refuse_what_differs_in_the_format_of_its_kv_and_frontends_know_it(field: str) -> None:
    engine = cards.changed(cards.ENGINE, layout="l", transport="tcp")
    handoff = builders.handoff(num_tokens=1, layout="l")
    attempt = Attempt("a", "r", [1, 2, 3], 3, Sampling(max_tokens=1))
    same = mismatch(handoff, attempt, engine)
    assert same is not None
    assert same.startswith("last_hash")
    changed = msgspec.structs.replace(handoff, **{field: 32 if field == "block_size" else "other"})
    other = mismatch(changed, attempt, engine)
    assert other is not None
    assert other.startswith(f"{field} is ")
    assert kv_format(handoff) == kv_format(engine) == kv_format(OLD_P.engine)
    assert kv_format(changed) != kv_format(engine)


@pytest.mark.parametrize(
    ("workers", "alone", "models"),
    [
        ([], [], []),
        ([OLD_P, OLD_D], [], []),
        ([OLD_P, OLD_D, NEW_P, NEW_D], [], []),
        ([OLD_P, OLD_D, NEW_D], ["d1"], []),
        ([OLD_P, OLD_D, NEW_P], ["p1"], []),
        ([OLD_P, NEW_D], ["p0", "d1"], ["m"]),
        ([OLD_P, NEW_D, card("d2", D)], ["d1"], []),
        ([OLD_P], [], []),  # that there is nobody to decode is another matter
        ([NEW_D, card("a", A, transport="")], [], []),
        ([OLD_P, card("a", A, transport="")], [], []),
        ([OLD_P, card("d1", D, 32, model="other")], [], []),
        ([OLD_P, NEW_D, card("p9", P, model="other"), card("d9", D, model="other")], ["p0", "d1"], ["m"]),
    ],
)
def test_who_has_no_partner(workers: list[Card], alone: list[str], models: list[str]) -> None:
    found = unpaired(workers)
    assert list(found) == alone
    assert list(without_pairs(workers, found)) == models


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (card("d", D, 32), "block_size is 16, theirs 32"),
        (card("d", D, 32, "other"), "block_size is 16, theirs 32"),  # its layout says nothing more
        (card("d", D, layout="x", engine="e 2"), "engine is 'e 1', theirs 'e 2'"),
        (card("d", D, transport="nixl"), "transport is 'tcp', theirs 'nixl'"),
        (card("d", D, layout="other"), "layout is 'l', theirs 'other'"),
    ],
)
def test_the_reason_says_what_differs(other: Card, why: str) -> None:
    found = unpaired([OLD_P, other])
    assert found["p0"] == f"no decode worker reads its KV: {why}"
    assert found["d"].startswith("it reads the KV of no prefill worker: ")
    assert without_pairs([OLD_P, other], found) == {"m": found["p0"]}
