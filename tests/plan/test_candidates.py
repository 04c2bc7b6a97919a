"""Which graphs are tried."""

from __future__ import annotations

from penstock.plan.candidates import RATIOS, Form, forms, layouts, variants
from penstock.plan.kinds import worker_kinds

KINDS = worker_kinds("qwen3-32b/h200")


def test_layouts_use_all_gpus_in_all_ratios() -> None:
    found = {(it.kind.gpus, it.aggregated, it.prefill, it.decode) for it in layouts(KINDS, 4)}
    assert found == {(1, 4, 0, 0), (1, 0, 1, 3), (1, 0, 2, 2), (1, 0, 3, 1), (2, 2, 0, 0), (2, 0, 1, 1)}


def test_layouts_of_many_gpus_are_not_too_many() -> None:
    found = layouts(KINDS, 64)
    assert len(found) == 2 * (1 + RATIOS)
    assert len(set(found)) == len(found)
    assert {it.gpus for it in found} == {64}
    assert all(it.aggregated or (it.prefill and it.decode) for it in found)


def test_layouts_are_none_where_no_worker_fits() -> None:
    assert layouts(worker_kinds("llama-3.1-70b/h200"), 3) == []


def test_forms_of_any_number_of_workers_can_serve() -> None:
    for form in forms(KINDS):
        for workers in range(form.least, 20):
            candidate = form.of(workers)
            assert candidate.workers == workers
            candidate.graph().check()
    assert Form(KINDS[0], 0.25).of(8).name == "2 prefill + 6 decode"


def test_variants_differ_in_one_setting_each() -> None:
    (candidate, *_) = layouts(KINDS, 4)
    found = variants(candidate, ["kv", "sticky"])
    assert [(it.policy, it.max_batch_tokens) for it in found] == [("kv", 2048), ("sticky", 8192)]
