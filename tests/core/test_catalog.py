from __future__ import annotations

import hashlib

from penstock.core.catalog import Catalog, fingerprint
from penstock.structs import Card, Role


def card(instance_id: str = "a", model: str = "m", **files: bytes) -> Card:
    assets = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return Card(instance_id, 1, Role.AGGREGATED, model, "e", 16, 10, 100, 50, assets=assets)


def put(catalog: Catalog, **files: bytes) -> None:
    for content in files.values():
        catalog.put(hashlib.sha256(content).hexdigest(), content)


def test_a_model_is_seen_once_its_files_are_here() -> None:
    catalog = Catalog()
    first = card(tokenizer=b"t", template=b"x")
    assert len(catalog.wanted(first)) == 2
    assert catalog.view("m") is None
    put(catalog, tokenizer=b"t", template=b"x")
    assert catalog.wanted(first) == []
    catalog.publish(first)
    view = catalog.view("m")
    assert view is not None
    assert view.assets == {"tokenizer": b"t", "template": b"x"}
    assert view.fingerprint == fingerprint(first)


def test_the_second_worker_of_a_model_fetches_nothing() -> None:
    catalog = Catalog()
    put(catalog, tokenizer=b"t")
    catalog.publish(card("a", tokenizer=b"t"))
    assert catalog.wanted(card("b", tokenizer=b"t")) == []
    assert catalog.agrees(card("b", tokenizer=b"t"))


def test_other_files_under_the_same_name_do_not_agree() -> None:
    catalog = Catalog()
    put(catalog, tokenizer=b"t")
    catalog.publish(card("a", tokenizer=b"t"))
    assert not catalog.agrees(card("b", tokenizer=b"other"))
    assert catalog.agrees(card("c", model="another", tokenizer=b"other"))


def test_files_that_no_model_uses_are_dropped() -> None:
    catalog = Catalog()
    put(catalog, tokenizer=b"old")
    catalog.publish(card("a", tokenizer=b"old"))
    put(catalog, tokenizer=b"new")
    catalog.publish(card("a", tokenizer=b"new"))
    assert catalog.wanted(card("b", tokenizer=b"old")) != []


def test_files_on_their_way_to_another_model_stay() -> None:
    catalog = Catalog()
    put(catalog, tokenizer=b"half of m2")
    put(catalog, tokenizer=b"t")
    catalog.publish(card("a", tokenizer=b"t"))
    assert catalog.wanted(card("b", "m2", tokenizer=b"half of m2")) == []


def test_a_fingerprint_names_all_that_rendering_and_checking_depend_on() -> None:
    base = card(tokenizer=b"t")
    other_limit = card(tokenizer=b"t")
    other_limit.max_model_len = 200
    other_default = card(tokenizer=b"t")
    other_default.sampling_defaults = {"temperature": 0.5}
    assert (
        len({fingerprint(each) for each in (base, other_limit, other_default, card(tokenizer=b"u"))}) == 4
    )
    assert fingerprint(card("b", tokenizer=b"t")) == fingerprint(base)
