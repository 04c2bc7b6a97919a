"""Prompts cut into words whose token ids can be kept, with the same result as encoding the whole.

Byte-level BPE looks at one pre-token at a time, and the pre-tokenizers in use (PATTERNS) never let one
reach over a single space into the word before: a space that stands alone between two words belongs to
the second. So a text may be cut there, and a word seen before is a lookup, at a tenth of the cost of
encoding it. Most words of a new prompt have been seen.

Cuts are made only where that is certain: no added token has whitespace of its own or takes any from its
neighbours, and the normalizer, if any, is NFC, in which nothing combines with a space after it.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Collection, Iterator
from itertools import chain

from tokenizers import AddedToken, Tokenizer

from penstock.shapes import JsonObject

PATTERNS = (
    # Qwen 2, 2.5 and 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    # Llama 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
"""Regular expressions of pre-tokenizers that may be cut before a single space."""

MAX_WORDS = 65_536
"""Kept for each model, some 15 MB; when there are more all are forgotten, and those in use come back."""

MAX_WORD_CHARS = 32
"""Longer ones, and those with line breaks, are rarely seen again."""

# A word, a single space before it included; whitespace of any other form stays with what surrounds it.
# Python's whitespace is at least Unicode's, which the patterns mean, so a cut is never inside of any.
_WORD = re.compile(r"(?: ?\S+|\s+\S*)(?:(?! \S)\s+\S*)*")

# Where a text may be cut for pieces: before a single space and, for languages that have none, between a
# letter and a mark of punctuation after it, of kinds that no normalizer joins.
_LETTER = r"[\u4e00-\u9fff\u3041-\u3096\u30a1-\u30fa]"
_MARK = r"[\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f]"
_CUT = re.compile(rf"(?<=\S) (?=\S)|(?<={_LETTER})(?={_MARK})")


class WordEncoder:
    """Encodes texts with one tokenizer. May be used from several threads."""

    def __init__(self, tokenizer: Tokenizer, spec: JsonObject) -> None:
        """`spec` is the tokenizer's tokenizer.json."""
        self._tokenizer = tokenizer
        self._cuts = _may_cut(spec, tokenizer.get_added_tokens_decoder().values())
        self._known: dict[str, list[int]] = {}

    def encode(self, texts: list[str]) -> list[array[int]]:
        """Each text's ids, without tokens added around them."""
        if not self._cuts:
            return [array("I", token_ids) for token_ids in self._encode(texts)]
        return [self._encode_words(_WORD.findall(text)) for text in texts]

    def pieces(self, text: str, chars: int) -> Iterator[str]:
        """The text in pieces that, encoded one by one, give its ids. Each but the last has `chars`
        characters, and whatever follows before the text can be cut: all of it, with some tokenizers."""
        begin = 0
        while self._cuts and len(text) - begin > chars:
            cut = _CUT.search(text, begin + chars)
            if cut is None:
                break
            yield text[begin : cut.start()]
            begin = cut.start()
        yield text[begin:]

    def _encode_words(self, words: list[str]) -> array[int]:
        found = list(map(self._known.get, words))
        new: dict[str, list[int]] = {}
        if None in found:
            missing = list({word: None for word, ids in zip(words, found, strict=True) if ids is None})
            new = dict(zip(missing, self._encode(missing), strict=True))
            self._keep(new)
        return array(
            "I",
            chain.from_iterable(
                new[word] if ids is None else ids for word, ids in zip(words, found, strict=True)
            ),
        )

    def _keep(self, new: dict[str, list[int]]) -> None:
        if len(self._known) + len(new) > MAX_WORDS:
            self._known.clear()
        for word, ids in new.items():
            if len(word) <= MAX_WORD_CHARS and len(self._known) < MAX_WORDS:
                self._known[word] = ids

    def _encode(self, texts: list[str]) -> list[list[int]]:
        try:
            # The batch call releases the GIL and computes no offsets, which a single encode() does not.
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except (Exception, KeyboardInterrupt):
            raise
        except BaseException as panic:  # noqa: BLE001 of `tokenizers`, which nobody above expects
            raise RuntimeError(f"the tokenizer failed: {panic}") from None
        return [encoding.ids for encoding in encodings]


def _may_cut(spec: JsonObject, added_tokens: Collection[AddedToken]) -> bool:
    model, normalizer = spec["model"], spec.get("normalizer")
    if model.get("type") != "BPE" or model.get("dropout") or normalizer not in (None, {"type": "NFC"}):
        return False
    if any(
        token.lstrip or token.rstrip or token.single_word or token.content.split() != [token.content]
        for token in added_tokens
    ):
        return False
    match spec.get("pre_tokenizer"):
        case {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}:  # GPT-2's pattern
            return True
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
            ],
        }:
            return pattern in PATTERNS
    return False
