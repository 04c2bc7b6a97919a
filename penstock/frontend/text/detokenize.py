"""Token ids to text, incrementally.

A token is bytes, not text: a character's bytes may be spread over several tokens. Two families of
tokenizers, together nearly all models, decode a token to the same bytes wherever it stands, so a table
from id to bytes and an incremental UTF-8 decoder do it all, at a fraction of what asking `tokenizers`
for each token costs:

    byte-level BPE (GPT-2, Llama 3, Qwen, ...)   each character of a token stands for one byte, by GPT-2's
                                                 table (github.com/openai/gpt-2, src/encoder.py)
    SentencePiece with byte fallback (Llama 2,   U+2581 stands for a space, `<0xE4>` for one byte
    Mistral, Gemma, ...)

Everything else goes through `tokenizers` itself, over a short window of tokens.

Special tokens have no text, unless a request wants their names. Bytes that are no UTF-8 become U+FFFD, as
everywhere. An answer continues its prompt: a leading space stays, where decoding the answer alone would
drop it as Llama 2's decoder does.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, Protocol

from tokenizers import Tokenizer

from penstock.shapes import JsonObject

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_SPACE_MARK = "\u2581"
_WINDOW_TOKENS = 6  # of the prompt: enough for any decoder's view of what comes before
_MAX_WINDOW_TOKENS = 64  # longest stretch without a whole character before it is given out as it is


class Detokenizer(Protocol):
    """One answer's text in the making."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete. Never part of a character."""

    def flush(self) -> str:
        """At the end: what an incomplete character leaves (U+FFFD), or nothing."""


class TokenTable:
    """What each token id stands for, in one model's vocabulary."""

    def __init__(self, pieces: dict[int, bytes], special: Iterable[int]) -> None:
        """`pieces` by token id; the `special` ones have no text."""
        self.raw_pieces = pieces  # special tokens by their names
        self.pieces = {**pieces, **dict.fromkeys(special, b"")}
        self.texts = _whole_texts(self.pieces)

    @cached_property
    def raw_texts(self) -> dict[int, str | None]:
        """As `texts`, special tokens by their names."""
        return _whole_texts(self.raw_pieces)

    @classmethod
    def of(cls, tokenizer: Tokenizer, spec: JsonObject) -> TokenTable | None:
        """The table of a tokenizer, `spec` being its tokenizer.json; None when a token's bytes depend on
        where it stands."""
        piece_of = _piece_function(spec.get("decoder"))
        if piece_of is None:
            return None
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        added = tokenizer.get_added_tokens_decoder()
        return cls(
            {token_id: piece_of(token) for token, token_id in vocabulary.items()},
            [token_id for token_id, token in added.items() if token.special],
        )


class TableDetokenizer:
    """The fast way: by table. Ids that no token has (padding of the vocabulary) stand for nothing."""

    __slots__ = ("_pending", "_pieces", "_texts")

    def __init__(self, table: TokenTable, *, special: bool = False) -> None:
        """`special`: special tokens have their names for a text."""
        self._texts = table.raw_texts if special else table.texts
        self._pieces = table.raw_pieces if special else table.pieces
        self._pending = b""  # the beginning of a character

    def push(self, token_ids: Sequence[int]) -> str:
        if not self._pending and len(token_ids) == 1:
            text = self._texts.get(token_ids[0], "")
            if text is not None:  # else part of a character
                return text
        piece_of = self._pieces.get
        coming = self._pending + b"".join([piece_of(token_id, b"") for token_id in token_ids])
        text, used = codecs.utf_8_decode(coming, "replace", False)
        self._pending = coming[used:]
        return text

    def flush(self) -> str:
        text, self._pending = self._pending.decode("utf-8", "replace"), b""
        return text


class WindowDetokenizer:
    """The general way: decode the latest tokens with and without the new ones.

    The window begins where text was complete, so what both decodings share is what was given out.
    """

    __slots__ = ("_ids", "_shown", "_skip_special", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], *, special: bool = False) -> None:
        """`special` as above."""
        self._tokenizer = tokenizer
        self._skip_special = not special
        self._ids = list(prompt_ids[-_WINDOW_TOKENS:])
        self._shown = len(self._ids)  # the window's tokens whose text was given out

    def push(self, token_ids: Sequence[int]) -> str:
        self._ids += token_ids
        return self._new_text(final=len(self._ids) - self._shown > _MAX_WINDOW_TOKENS)

    def flush(self) -> str:
        return self._new_text(final=True)

    def _new_text(self, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[: self._shown], skip_special_tokens=self._skip_special)
        after = self._tokenizer.decode(self._ids, skip_special_tokens=self._skip_special)
        if after == before:
            del self._ids[self._shown :]  # special tokens: nothing to see, and no context either
            return ""
        if after.endswith(_REPLACEMENT) and not final:
            return ""
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return after[len(before) :]


def _whole_texts(pieces: dict[int, bytes]) -> dict[int, str | None]:
    return {token_id: _whole_text(piece) for token_id, piece in pieces.items()}


def _whole_text(piece: bytes) -> str | None:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


# --- the families ---------------------------------------------------------------------------------


def _piece_function(decoder: Any) -> Callable[[str], bytes] | None:
    """The function from a token's name to its bytes, or None, by tokenizer.json's `decoder`."""
    steps = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else []
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level_piece
    if kinds in (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"]):
        spaces = {"type": "Replace", "pattern": {"String": _SPACE_MARK}, "content": " "}
        leading = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        if steps[0] == spaces and steps[3:] in ([], [leading]):
            return _sentencepiece_piece
    return None


def _byte_characters() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 characters stand for themselves, the other bytes for the
    characters from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + place): byte for place, byte in enumerate(others)})
    return table


_BYTES = _byte_characters()
_BYTE_CHARS = frozenset(_BYTES)
_TO_LATIN = str.maketrans({char: chr(byte) for char, byte in _BYTES.items()})


def _byte_level_piece(token: str) -> bytes:
    # Added tokens may hold other characters; they stand for themselves then.
    return token.translate(_TO_LATIN).encode("latin-1") if _BYTE_CHARS.issuperset(token) else token.encode()


_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _sentencepiece_piece(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes.fromhex(byte[1]) if byte else token.replace(_SPACE_MARK, " ").encode()
