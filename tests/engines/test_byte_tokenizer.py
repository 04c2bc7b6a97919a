from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from penstock.engines.byte_tokenizer import EOS_TOKEN_ID, VOCAB_SIZE, assets

TOKENIZER = Tokenizer.from_str(assets()["tokenizer.json"].decode())


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="|"), max_size=50))
def test_a_token_is_a_byte(text: str) -> None:
    token_ids = TOKENIZER.encode(text).ids
    assert token_ids == list(text.encode())
    assert TOKENIZER.decode(token_ids) == text


def test_special_tokens_stand_for_themselves() -> None:
    assert TOKENIZER.encode("a<|im_end|>").ids == [ord("a"), EOS_TOKEN_ID]
    assert TOKENIZER.get_vocab_size() == VOCAB_SIZE
