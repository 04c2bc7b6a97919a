"""Prompts cut into segments encode to the ids of the whole, whatever the tokenizer."""

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers

from penstock.frontend.text.segments import MAX_SEGMENTS, SegmentCache, Segmenter

ADDED = [  # everything that an added token can be, and some that overlap
    AddedToken("<|a|>", special=True, normalized=False),
    AddedToken("<|a|><|b|>", special=True, normalized=False),
    AddedToken("<|b|>", normalized=False),
    AddedToken("<n>", normalized=True),
    AddedToken("<l>", lstrip=True, special=True, normalized=False),
    AddedToken("<r>", rstrip=True, special=True, normalized=False),
    AddedToken("  ", normalized=False),
    AddedToken(" <x> ", normalized=False),
    AddedToken("<x>", normalized=False),
]
PIECES = st.sampled_from([token.content for token in ADDED] + ["<|", "|>", "<", "a", "b"])
PLAIN = st.text(st.sampled_from(" \n\tab.AéÅ你😀"), max_size=6)
TEXTS = st.lists(st.one_of(PIECES, PLAIN), max_size=16).map("".join)


def variants(families):
    """Each family as it is, with odd added tokens, and with odd normalizers and pre-tokenizers."""
    for name, make in families.items():
        yield name, make()
        odd = make()
        odd.add_tokens(ADDED)
        yield f"{name}, added tokens", odd
        shy = make()
        shy.add_tokens([*ADDED, AddedToken("word", single_word=True, normalized=False)])
        yield f"{name}, single words", shy
    prefixed = families["byte-level"]()
    prefixed.add_tokens(ADDED)
    prefixed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    yield "prefix space", prefixed
    legacy = families["metaspace always"]()
    legacy.add_tokens(ADDED)
    legacy.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    legacy.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    yield "legacy Llama", legacy
    stripped = families["byte-level"]()
    stripped.add_tokens(ADDED)
    stripped.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()]
    )
    yield "strip and lowercase", stripped


@pytest.fixture(scope="module")
def tokenizers(tokenizer_families):
    return dict(variants(tokenizer_families))


def segmenter_of(tokenizer):
    return Segmenter(tokenizer.get_added_tokens_decoder().values())


@given(text=TEXTS)
def test_segments_encode_to_the_ids_of_the_whole(tokenizers, text):
    for name, tokenizer in tokenizers.items():
        segments = segmenter_of(tokenizer).split(text)
        assert "".join(segments) == text
        encodings = tokenizer.encode_batch_fast(segments, add_special_tokens=False)
        whole = tokenizer.encode(text, add_special_tokens=False).ids
        assert [i for encoding in encodings for i in encoding.ids] == whole, (name, segments)


def test_a_chat_falls_into_its_messages(byte_level):
    text = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert segmenter_of(byte_level).split(text) == [
        "<|im_start|>system\nBe kind.",
        "<|im_end|>\n",
        "<|im_start|>user\nHi",
        "<|im_end|>\n",
    ]


def test_no_cut_where_the_text_beyond_could_matter(tokenizers):
    assert segmenter_of(tokenizers["byte-level, single words"]).split("a<|a|>b") == ["a<|a|>b"]
    odd = segmenter_of(tokenizers["byte-level, added tokens"])
    assert odd.split("a <l>b<r> c<n>d") == ["a <l>b<r> c<n>d"]
    assert odd.split("a<|a|><|b|>c<|b|>") == ["a", "<|a|><|b|>c", "<|b|>"]


def test_the_number_of_segments_is_bounded(byte_level):
    text = "<|im_end|>a" * (MAX_SEGMENTS + 10)
    segments = segmenter_of(byte_level).split(text)
    assert len(segments) == MAX_SEGMENTS
    assert segments[-1] == "<|im_end|>a" * 11


def test_a_tokenizer_without_added_tokens_is_not_cut():
    assert Segmenter([]).split("any <text>") == ["any <text>"]
    assert Segmenter([]).split("") == [""]


def test_the_cache_keeps_what_was_used_last_within_its_bytes():
    cache = SegmentCache(3 * 1000)
    for name in "abc":
        cache.put(name * 500, array("I", range(50)))
    assert cache.get("a" * 500) is not None
    cache.put("d" * 500, array("I", range(50)))
    assert cache.get("b" * 500) is None
    assert list(cache.get("a" * 500)) == list(range(50))
    assert cache.get("d" * 500) is not None
    cache.put("e" * 100_000, array("I"))  # more than fits: nothing is left, not even this
    assert all(cache.get(key) is None for key in ("a" * 500, "d" * 500, "e" * 100_000))
    cache.put("f", array("I", [1]))
    assert list(cache.get("f")) == [1]
