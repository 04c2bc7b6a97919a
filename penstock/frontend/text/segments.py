"""Prompts cut into segments whose token ids can be kept, with the same result as encoding the whole.

`tokenizers` cuts a text at its added tokens before anything else, and what happens between two of them
does not depend on what lies beyond (tokenizers, added_vocabulary.rs: extract_and_normalize). So a chat
prompt falls into segments, each beginning with a special token and reaching to the next one, and a
conversation's next turn costs a lookup per earlier message.

A cut is made only at an added token for which that is certain:

- it is not `normalized`, so it is looked for in the raw text, before any normalizer;
- neither `lstrip` nor `rstrip`, and without whitespace at its own ends, so no whitespace changes sides;
- no added token is `single_word`, which looks at the characters beside it.

Where tokens overlap, the first and then the longest wins, over all tokens that are looked for in the raw
text, as in `tokenizers`. A segment keeps the special token it begins with, because some tokenizers
(Metaspace with `prepend_scheme: first`) treat text at the very beginning of a prompt differently.
"""

from __future__ import annotations

import re
from array import array
from collections import OrderedDict
from collections.abc import Collection

from tokenizers import AddedToken

MAX_SEGMENTS = 8192
"""Of a prompt; the last one is all the rest. As many messages as a request may have are about so many, and
what a prompt costs on the event loop is bounded."""

_ENTRY_OVERHEAD_BYTES = 300  # a string's, an array's and a dictionary entry's, beside their contents


class Segmenter:
    """Knows where prompts may be cut, for one tokenizer's added tokens."""

    def __init__(self, added_tokens: Collection[AddedToken]) -> None:
        raw = [token for token in added_tokens if not token.normalized and token.content]
        by_length = sorted((token.content for token in raw), key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, by_length)))
        self._cuts = frozenset(token.content for token in raw if _is_clean(token))
        if any(token.single_word for token in added_tokens):
            self._cuts = frozenset()

    def split(self, text: str) -> list[str]:
        """Segments that give `text` when joined. Encoded one by one, without tokens added around them,
        they give the ids of the whole."""
        if not self._cuts:
            return [text]
        segments, begin = [], 0
        for match in self._any.finditer(text):
            start = match.start()
            if start > begin and match[0] in self._cuts:
                segments.append(text[begin:start])
                begin = start
                if len(segments) == MAX_SEGMENTS - 1:
                    break
        segments.append(text[begin:])
        return segments


class SegmentCache:
    """Token ids of the segments used last, within a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._entries: OrderedDict[str, array[int]] = OrderedDict()

    def get(self, segment: str) -> array[int] | None:
        token_ids = self._entries.get(segment)
        if token_ids is not None:
            self._entries.move_to_end(segment)
        return token_ids

    def put(self, segment: str, token_ids: array[int]) -> None:
        if segment in self._entries:
            return
        self._entries[segment] = token_ids
        self._bytes += _entry_bytes(segment, token_ids)
        while self._bytes > self._max_bytes:
            self._bytes -= _entry_bytes(*self._entries.popitem(last=False))


def _is_clean(token: AddedToken) -> bool:
    content = token.content
    return not token.lstrip and not token.rstrip and content == content.strip()


def _entry_bytes(segment: str, token_ids: array[int]) -> int:
    # Up to 4 bytes a character in memory; texts beyond Latin-1 take 2 or 4.
    width = 1 if segment.isascii() else 4
    return len(segment) * width + len(token_ids) * token_ids.itemsize + _ENTRY_OVERHEAD_BYTES
