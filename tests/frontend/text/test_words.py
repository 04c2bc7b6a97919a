"""Texts cut into words encode to the ids of the whole, whatever the tokenizer."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

from penstock.frontend.text import words
from penstock.frontend.text.words import PATTERNS, WordEncoder

WORDS = [
    "Hello",
    "world",
    "it's",
    "I'LL",
    "don't",
    "2024",
    "3.5",
    "<|im_start|>",
    "--",
    "你好",
    "é",
    "e\u0301",
]
SPACES = [" ", "  ", "\n", "\n\n", " \n ", "\t", "\r\n", "\u00a0", "\u2028", "\x1c", "\u3000", "\u0301", ""]
TEXTS = st.lists(
    st.one_of(st.sampled_from(WORDS), st.sampled_from(SPACES), st.text(max_size=3)), max_size=24
).map("".join)


def by_pattern(make, pattern) -> Tokenizer:
    tokenizer = make()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers(tokenizer_families):
    make = tokenizer_families["byte-level"]
    all_of = {name: make() for name, make in tokenizer_families.items()}
    for number, pattern in enumerate(PATTERNS):
        all_of[f"pattern {number}"] = by_pattern(make, pattern)
        all_of[f"pattern {number}, NFC"] = by_pattern(make, pattern)
        all_of[f"pattern {number}, NFC"].normalizer = normalizers.NFC()
    all_of["gpt-2"] = make()
    all_of["gpt-2"].pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    all_of["whole"] = make()
    all_of["whole"].pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for name, token in {
        "whitespace": AddedToken(" two words ", normalized=False),
        "greedy": AddedToken("Hello", rstrip=True, normalized=False),
        "single": AddedToken("world", single_word=True, normalized=False),
    }.items():
        all_of[name] = by_pattern(make, PATTERNS[0])
        all_of[name].add_tokens([token])
    return {name: (tokenizer, encoder_of(tokenizer)) for name, tokenizer in all_of.items()}


def encoder_of(tokenizer) -> WordEncoder:
    return WordEncoder(tokenizer, json.loads(tokenizer.to_str()))


@given(texts=st.lists(TEXTS, max_size=3))
def test_words_encode_to_the_ids_of_the_whole(tokenizers, texts):
    for name, (tokenizer, encoder) in tokenizers.items():
        whole = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        for _ in range(2):  # the second time its words are known
            assert list(map(list, encoder.encode(texts))) == whole, name


def test_which_tokenizers_are_cut(tokenizers):
    cut = {name for name, (_, encoder) in tokenizers.items() if encoder._cuts}
    patterns = {f"pattern {number}" for number in range(len(PATTERNS))}
    assert cut - {"byte-level"} == patterns | {f"{name}, NFC" for name in patterns} | {"gpt-2"}


def test_words_begin_at_single_spaces_only():
    text = "one two  three\nfour five \n six seven"
    assert words._WORD.findall(text) == ["one", " two  three\nfour", " five \n six", " seven"]


@given(TEXTS)
def test_words_are_the_text(text):
    assert "".join(words._WORD.findall(text)) == text


COMMA = "\uff0c"
CHINESE = st.text("你好。カな、 \n1a" + COMMA + "\uff01\uff1a\uff1b\uff1f", max_size=24)


@given(text=st.one_of(TEXTS, CHINESE), chars=st.integers(1, 12))
def test_pieces_encode_to_the_ids_of_the_whole(tokenizers, text, chars):
    for name, (tokenizer, encoder) in tokenizers.items():
        pieces = list(encoder.pieces(text, chars))
        assert "".join(pieces) == text
        ids = [token_id for part in encoder.encode(pieces) for token_id in part]
        assert ids == tokenizer.encode(text, add_special_tokens=False).ids, name


def test_pieces_are_as_short_as_they_may_be(tokenizers):
    text = "one two  three four\nfive six"
    assert list(tokenizers["pattern 0"][1].pieces(text, 4)) == ["one two  three", " four\nfive", " six"]
    assert list(tokenizers["pattern 0"][1].pieces("x" * 100, 4)) == ["x" * 100]
    chinese = f"你好{COMMA}世界。" * 2
    cut = [f"你好{COMMA}世界", f"。你好{COMMA}世界", "。"]
    assert list(tokenizers["pattern 0"][1].pieces(chinese, 4)) == cut
    assert list(tokenizers["word piece"][1].pieces(text, 4)) == [text]


def test_what_is_kept_is_bounded(tokenizers, monkeypatch):
    monkeypatch.setattr(words, "MAX_WORDS", 10)
    tokenizer, _ = tokenizers["pattern 0"]
    encoder = encoder_of(tokenizer)
    for round_number in range(5):
        text = " ".join(f"w{round_number}x{number}" for number in range(7))
        assert list(encoder.encode([text])[0]) == tokenizer.encode(text, add_special_tokens=False).ids
        assert 0 < len(encoder._known) <= 10
    encoder.encode(["x" * 1000 + " " + " ".join(map(str, range(50)))])
    assert len(encoder._known) <= 10
    assert max(map(len, encoder._known)) <= words.MAX_WORD_CHARS


def test_a_panic_of_the_tokenizer_is_an_error(byte_level):
    spec = json.loads(byte_level.to_str()) | {"pre_tokenizer": {"type": "FixedLength", "length": 0}}
    with pytest.raises(RuntimeError, match="the tokenizer failed: chunk size must be non-zero"):
        WordEncoder(Tokenizer.from_str(json.dumps(spec)), spec).encode(["x"])
