"""Block hashes: chained, seeded, and stable across machines."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from penstock.core.hashing import block_hash, last_hash, root_hash, sequence_hashes

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=70)


@given(TOKENS, st.integers(1, 17))
def test_one_hash_for_each_whole_block_chained_by_block_hash(tokens: list[int], block_size: int) -> None:
    parent = root = root_hash("model")
    expected = []
    for start in range(0, len(tokens) - block_size + 1, block_size):
        parent = block_hash(tokens[start : start + block_size], parent)
        expected.append(parent)
    assert sequence_hashes(tokens, block_size, root) == expected


@given(TOKENS, TOKENS, st.integers(1, 8))
def test_a_common_prefix_has_common_hashes(tokens: list[int], tail: list[int], block_size: int) -> None:
    root = root_hash("model")
    hashes = sequence_hashes(tokens, block_size, root)
    assert sequence_hashes(tokens + tail, block_size, root)[: len(hashes)] == hashes


@given(TOKENS, st.integers(0, 69), st.integers(1, 8))
def test_a_changed_token_changes_every_hash_from_there(
    tokens: list[int], position: int, block_size: int
) -> None:
    if position >= len(tokens):
        return
    changed = list(tokens)
    changed[position] ^= 1
    root = root_hash("model")
    before = sequence_hashes(tokens, block_size, root)
    after = sequence_hashes(changed, block_size, root)
    first = position // block_size
    assert before[:first] == after[:first]
    assert all(a != b for a, b in zip(before[first:], after[first:], strict=True))


@given(TOKENS, st.integers(1, 8))
def test_last_hash_is_of_the_last_block_whole_or_partial(tokens: list[int], block_size: int) -> None:
    root = root_hash("model")
    whole = sequence_hashes(tokens, block_size, root)
    tail = tokens[len(whole) * block_size :]
    parent = whole[-1] if whole else root
    assert last_hash(tokens, block_size, root) == (block_hash(tail, parent) if tail else parent)


def test_roots_differ_by_model_salt_and_adapter() -> None:
    roots = [
        root_hash("ab", "c"),
        root_hash("a", "bc"),
        root_hash("ab", "", "c"),
        root_hash("abc"),
        root_hash("ab"),
        root_hash("ab", "c", "c"),
    ]
    assert len(set(roots)) == len(roots)
    assert len({tuple(sequence_hashes([1, 2, 3], 2, root)) for root in roots}) == len(roots)


def test_known_values() -> None:
    """Frontends and workers of different versions and machines must agree for ever."""
    root = 5996342643462224776
    assert root_hash("m") == root
    assert sequence_hashes([1, 2, 3, 4, 5], 2, root) == [12138174369896635366, 12103074300764848865]


def test_a_token_beyond_32_bits_is_refused() -> None:
    with pytest.raises(OverflowError):
        sequence_hashes([2**32], 1, 0)
