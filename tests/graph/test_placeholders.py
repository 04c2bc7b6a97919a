from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.graph.placeholders import for_kubelet, names_used, placeholder, with_references


def expanded_by_kubelet(text: str, env: dict[str, str]) -> str:
    """k8s.io/kubernetes/third_party/forked/golang/expansion, in a line."""
    return re.sub(
        r"\$(\$|\(([^)]*)\))",
        lambda found: "$" if found[1] == "$" else env.get(found[2], found[0]),
        text,
    )


@given(st.text(alphabet="$()A{}x ", max_size=12))
def test_a_kubelet_gives_back_what_was_written(text: str) -> None:
    assert expanded_by_kubelet(for_kubelet(text), {"A": "changed", "": "changed"}) == text


@given(st.text(alphabet="$()A x", max_size=6), st.text(alphabet="$()A x", max_size=6))
def test_a_kubelet_puts_values_where_variables_are_held(before: str, after: str) -> None:
    text = for_kubelet(f"{before}{placeholder('A')}{after}")
    assert expanded_by_kubelet(text, {"A": "value"}) == f"{before}value{after}"


def test_messages_show_references() -> None:
    assert with_references(f"--port {placeholder('PORT')}") == "--port $(PORT)"


@pytest.mark.parametrize(
    ("word", "used"),
    [
        ("$(A) $B ${C}", ["A", "B", "C"]),
        ("${A:-x} $1 $$ $", []),
        ("$KNOWN $(KNOWN)", []),
        ("$A-$A", ["A"]),
    ],
)
def test_variables_that_words_refer_to(word: str, used: list[str]) -> None:
    assert names_used([word], {"KNOWN": ""}) == used
