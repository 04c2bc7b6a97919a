"""Streamed text is exactly the decoded text, and never holds part of a character."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.frontend.text.detokenize import TableDetokenizer, TokenTable, WindowDetokenizer

SIMPLE = "abc The name is 12,.!?\n\t'"
WIDE = "é你好世界こ😀👍🏽\u200dß\u0301"
TEXTS = st.text(
    st.one_of(st.sampled_from(SIMPLE), st.sampled_from(WIDE), st.characters(exclude_categories=["Cs"]))
)
CUTS = st.lists(st.integers(1, 4), min_size=1, max_size=8)


def table_of(tokenizer):
    return TokenTable.of(tokenizer, json.loads(tokenizer.to_str()))


def streamed(detokenizer, token_ids, cuts):
    """The pieces given out for the tokens, taken a few at a time."""
    pieces, position, turn = [], 0, 0
    while position < len(token_ids):
        width = cuts[turn % len(cuts)]
        pieces.append(detokenizer.push(token_ids[position : position + width]))
        position, turn = position + width, turn + 1
    return [*pieces, detokenizer.flush()]


@given(text=TEXTS, cuts=CUTS)
def test_byte_level_text_comes_back(byte_level, text, cuts):
    token_ids = byte_level.encode(text, add_special_tokens=False).ids
    pieces = streamed(TableDetokenizer(table_of(byte_level)), token_ids, cuts)
    assert "".join(pieces) == byte_level.decode(token_ids)


@given(data=st.data(), cuts=CUTS)
def test_any_byte_level_tokens_decode_as_a_whole(byte_level, data, cuts):
    size = byte_level.get_vocab_size()
    token_ids = data.draw(st.lists(st.integers(0, size + 5), max_size=30))
    pieces = streamed(TableDetokenizer(table_of(byte_level)), token_ids, cuts)
    assert "".join(pieces) == byte_level.decode(token_ids, skip_special_tokens=True)


@given(text=TEXTS, cuts=CUTS)
def test_sentencepiece_continues_its_prompt(sentencepiece, text, cuts):
    prompt = sentencepiece.encode("x", add_special_tokens=False).ids
    token_ids = sentencepiece.encode("x" + text, add_special_tokens=False).ids[len(prompt) :]
    whole = sentencepiece.decode(prompt + token_ids)
    pieces = streamed(TableDetokenizer(table_of(sentencepiece)), token_ids, cuts)
    assert "".join(pieces) == whole[len(sentencepiece.decode(prompt)) :]


@given(text=TEXTS, cuts=CUTS)
def test_the_window_continues_its_prompt(word_piece, sentencepiece, text, cuts):
    for tokenizer in (word_piece, sentencepiece):
        prompt = tokenizer.encode("name", add_special_tokens=False).ids
        token_ids = tokenizer.encode("name " + text, add_special_tokens=False).ids[len(prompt) :]
        whole = tokenizer.decode(prompt + token_ids)
        pieces = streamed(WindowDetokenizer(tokenizer, prompt), token_ids, cuts)
        assert "".join(pieces) == whole[len(tokenizer.decode(prompt)) :]


@given(text=TEXTS)
def test_no_piece_breaks_a_character(byte_level, sentencepiece, text):
    text = text.replace("\ufffd", "")
    for tokenizer in (byte_level, sentencepiece):
        token_ids = tokenizer.encode(text, add_special_tokens=False).ids
        for detokenizer in (TableDetokenizer(table_of(tokenizer)), WindowDetokenizer(tokenizer, [])):
            assert not any("\ufffd" in piece for piece in streamed(detokenizer, token_ids, [1]))


def test_an_emoji_waits_for_its_last_byte(byte_level):
    token_ids = byte_level.encode("😺", add_special_tokens=False).ids
    assert len(token_ids) > 1
    pieces = streamed(TableDetokenizer(table_of(byte_level)), token_ids, [1])
    assert [piece for piece in pieces if piece] == ["😺"]


def test_what_never_becomes_a_character_is_replaced_at_the_end(byte_level):
    first = byte_level.encode("😺", add_special_tokens=False).ids[0]
    detokenizer = TableDetokenizer(table_of(byte_level))
    assert detokenizer.push([first]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_special_tokens_have_no_text_but_a_name(byte_level):
    table = table_of(byte_level)
    end = byte_level.token_to_id("<|im_end|>")
    think = byte_level.token_to_id("<think>")
    assert TableDetokenizer(table).push([end, think]) == "<think>"
    assert table.raw_pieces[end] == b"<|im_end|>"


def test_ids_that_no_token_has_stand_for_nothing(byte_level):
    size = byte_level.get_vocab_size()
    assert TableDetokenizer(table_of(byte_level)).push([size + 9]) == ""


def test_byte_fallback_needs_no_library_call(sentencepiece):
    table = table_of(sentencepiece)
    bytes_of = [sentencepiece.token_to_id(f"<0x{byte:02X}>") for byte in "你".encode()]
    assert streamed(TableDetokenizer(table), bytes_of, [1]) == ["", "", "你", ""]


@pytest.mark.parametrize(
    "decoder", [None, {"type": "WordPiece"}, {"type": "Sequence", "decoders": [{"type": "Fuse"}]}]
)
def test_other_decoders_have_no_table(byte_level, decoder):
    assert TokenTable.of(byte_level, {"decoder": decoder}) is None


def test_a_window_of_special_tokens_does_not_grow(word_piece):
    prompt = word_piece.encode("my name is", add_special_tokens=False).ids
    end = word_piece.token_to_id("[SEP]")
    detokenizer = WindowDetokenizer(word_piece, prompt)
    assert "".join(detokenizer.push([end]) for _ in range(1000)) == ""
    assert detokenizer.push(word_piece.encode("name", add_special_tokens=False).ids) == " name"
