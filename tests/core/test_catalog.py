from __future__ import annotations

import hashlib
from typing import Any

import pytest

from penstock.core.catalog import Catalog, differences, revision_of, serves
from penstock.shapes import Card, ModelKey, Role
from tests import cards
from tests.cards import changed


def card(instance_id: str = "a", model: str = "m", role: Role = Role.AGGREGATED, **files: bytes) -> Card:
    assets = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return cards.card(instance_id, role, model=model, vocab_size=50, max_model_len=100, assets=assets)


def put(catalog: Catalog, **files: bytes) -> None:
    for content in files.values():
        catalog.put(hashlib.sha256(content).hexdigest(), content)


def keep(catalog: Catalog, *cards: Card) -> None:
    catalog.keep({ModelKey(each.model.name, revision_of(each)): each for each in cards})


def test_a_model_has_a_view_once_its_files_are_here() -> None:
    catalog = Catalog()
    first = card(tokenizer=b"t", template=b"x")
    assert len(catalog.wanted(first)) == 2
    assert catalog.view(ModelKey("m", revision_of(first))) is None
    put(catalog, tokenizer=b"t", template=b"x")
    assert catalog.wanted(first) == []
    view = catalog.publish(first)
    assert catalog.view(ModelKey("m", revision_of(first))) is view
    assert view.assets == {"tokenizer": b"t", "template": b"x"}
    assert view.revision == revision_of(first)


def test_nothing_is_fetched_for_the_second_worker_of_a_revision() -> None:
    catalog = Catalog()
    put(catalog, tokenizer=b"t")
    catalog.publish(card("a", tokenizer=b"t"))
    assert catalog.wanted(card("b", tokenizer=b"t")) == []
    assert revision_of(card("a", tokenizer=b"t")) == revision_of(card("b", tokenizer=b"t"))


def test_two_revisions_of_a_model_have_a_view_each() -> None:
    catalog = Catalog()
    cards = [card(tokenizer=b"old"), card(tokenizer=b"new")]
    put(catalog, tokenizer=b"old")
    put(catalog, tokenizer=b"new")
    for each in cards:
        catalog.publish(each)
    views = [catalog.view(ModelKey("m", revision_of(each))) for each in cards]
    assert [view and view.assets for view in views] == [{"tokenizer": b"old"}, {"tokenizer": b"new"}]


def test_what_no_kept_card_needs_is_dropped() -> None:
    catalog = Catalog()
    old, new = card(tokenizer=b"old", template=b"both"), card(tokenizer=b"new", template=b"both")
    put(catalog, tokenizer=b"old", template=b"both")
    put(catalog, tokenizer=b"new")
    catalog.publish(old)
    catalog.publish(new)
    keep(catalog, new)
    assert catalog.view(ModelKey("m", revision_of(old))) is None
    assert catalog.view(ModelKey("m", revision_of(new))) is not None
    assert len(catalog.wanted(old)) == 1  # the template is the new one's as well
    keep(catalog)
    assert len(catalog.wanted(new)) == 2


def test_files_on_their_way_to_a_card_stay() -> None:
    catalog = Catalog()
    loading = card("b", "m2", tokenizer=b"t", template=b"not here yet")
    put(catalog, tokenizer=b"t")
    keep(catalog, loading)
    assert len(catalog.wanted(loading)) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("assets", {"tokenizer": "0" * 64}),
        ("weights", "others"),
        ("max_model_len", 200),
        ("vocab_size", 51),
        ("eos_token_ids", [1]),
        ("temperature", 0.5),
        ("structured_output", True),
        ("tool_parser", "hermes"),
        ("reasoning_parser", "qwen3"),
    ],
)
def test_the_revision_changes_with_all_that_an_answer_depends_on(field: str, value: Any) -> None:
    base = card(tokenizer=b"t")
    other = changed(base, **{field: value})
    assert revision_of(other) != revision_of(base)
    names = {"assets": "tokenizer", "temperature": "sampling_defaults"}
    assert differences(other, base) == [names.get(field, field)]


@pytest.mark.parametrize("field", ["instance_id", "engine", "layout", "transport"])
def test_workers_of_a_revision_may_differ_in_what_no_answer_depends_on(field: str) -> None:
    base = card(tokenizer=b"t")
    assert revision_of(changed(base, **{field: "another"})) == revision_of(base)


def test_a_prefill_worker_need_not_know_how_answers_are_drawn_and_read() -> None:
    decode = changed(card(role=Role.DECODE, tokenizer=b"t"), tool_parser="hermes")
    prefill = revision_of(card(role=Role.PREFILL, tokenizer=b"t"))
    assert serves(prefill, revision_of(decode))
    assert not serves(revision_of(decode), prefill)
    assert not serves(revision_of(card(role=Role.PREFILL, tokenizer=b"u")), revision_of(decode))
    assert not serves(revision_of(card(role=Role.DECODE, tokenizer=b"t")), revision_of(decode))
