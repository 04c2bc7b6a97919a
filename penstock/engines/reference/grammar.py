"""What an answer must look like, as a mask over the vocabulary for each of its tokens.

llguidance compiles a schema, regular expression or grammar, and computes the masks. A grammar that has been
compiled is kept, since a client sends the same one with each request of a kind.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

import llguidance
import msgspec
import numpy as np
from numpy.typing import NDArray

from penstock.engines.batch import Sequence
from penstock.engines.reference.tiles import Floats
from penstock.shapes import StructuredOutput

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_KEPT: Final = 64
"""Compiled grammars that are kept; a specification has at most 256 KiB (frontend/structured.py)."""

JSON_OPTIONS: Final[JsonCompileOptions] = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
"""No free white space: a small model that may write as much of it as it likes often never stops. The
separators are those of Python's json, which chat templates write as well."""

ANY_OBJECT: Final = '{"type": "object"}'


class InvalidGrammar(ValueError):
    """The specification cannot be compiled; says why."""


class Grammars:
    """Compiles for one tokenizer. Used from one thread.

    Args:
        tokenizer_json: Hugging Face's tokenizer.json.
        vocab_size: rows of the model's output, at least the tokenizer's tokens.
        eos_token_ids: what may follow a complete answer.
        reasoning_end: the special token that ends the model's reasoning, if it reasons. Raises ValueError
            when the tokenizer does not have it.
    """

    def __init__(
        self, tokenizer_json: str, vocab_size: int, eos_token_ids: list[int], reasoning_end: str = ""
    ) -> None:
        self._tokenizer = llguidance.LLTokenizer(
            tokenizer_json, n_vocab=vocab_size, eos_token=eos_token_ids
        )
        self._reasoning_end_id: int | None = None
        if reasoning_end:
            ids = self._tokenizer.tokenize_str(reasoning_end, parse_special=True)
            if len(ids) != 1:
                raise ValueError(f"it has no token {reasoning_end}")
            self._reasoning_end_id = ids[0]
        self._compiled: OrderedDict[tuple[str, str], llguidance.LLMatcher] = OrderedDict()

    @property
    def kept(self) -> int:
        """Compiled grammars that are kept now."""
        return len(self._compiled)

    def begin(self, wanted: StructuredOutput) -> AnswerGrammar:
        """For one attempt. Raises InvalidGrammar."""
        key = (wanted.kind, wanted.spec)
        matcher = self._compiled.get(key)
        if matcher is None:
            matcher = self._compile(wanted)
            self._compiled[key] = matcher
            if len(self._compiled) > MAX_KEPT:
                self._compiled.popitem(last=False)
        else:
            self._compiled.move_to_end(key)
        reasons = wanted.reasoning_ended is False
        return AnswerGrammar(matcher.deep_copy(), after=self._reasoning_end_id if reasons else None)

    def _compile(self, wanted: StructuredOutput) -> llguidance.LLMatcher:
        try:
            grammar = _grammar_of(wanted)
        except (
            ValueError,
            TypeError,
            KeyError,
            AssertionError,
        ) as error:  # whatever the library says so by
            raise InvalidGrammar(f"{wanted.kind}: {error}") from error
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise InvalidGrammar(f"{wanted.kind}: {_first_line(matcher)}")
        return matcher


class AnswerGrammar:
    """Follows the output of one attempt: each call of `restrict` takes the tokens since the last one."""

    def __init__(self, matcher: llguidance.LLMatcher, after: int | None) -> None:
        """`after`: the token that must have come before the grammar applies, if any must."""
        self._matcher = matcher
        self._after = after
        self._taken = 0

    def restrict(self, logits: Floats, sequence: Sequence) -> bool:
        """Set to -inf, in place, every token that must not come next. Returns whether the answer is
        complete, so that only an end-of-sequence token may follow.

        An output that breaks the grammar can only be ended: it came from an attempt of another engine."""
        output = sequence.token_ids[sequence.prompt_len + self._taken :]
        self._taken += len(output)
        if self._after is not None:
            if self._after not in output:
                return False
            output = output[output.index(self._after) + 1 :]
            self._after = None
        self._matcher.consume_tokens(output)
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed: NDArray[np.uint8] = np.unpackbits(packed, count=len(logits), bitorder="little")
        logits[allowed == 0] = -np.inf
        return self._matcher.is_stopped()


class _OldTag(msgspec.Struct):
    """A place with a form, as in the older of xgrammar's two shapes."""

    begin: str
    end: str
    schema: dict[str, object] | None = None


class _OldTags(msgspec.Struct):
    structures: list[_OldTag]
    triggers: list[str]


def _grammar_of(wanted: StructuredOutput) -> str:
    """In llguidance's language. Raises ValueError and other errors for what is wrong with it."""
    match wanted.kind:
        case "json":
            return llguidance.LLMatcher.grammar_from_json_schema(wanted.spec, JSON_OPTIONS)
        case "json_object":
            return llguidance.LLMatcher.grammar_from_json_schema(ANY_OBJECT, JSON_OPTIONS)
        case "structural_tag":
            return _of_tags(wanted.spec)
        case kind:
            return llguidance.grammar_from(kind, wanted.spec)


def _of_tags(spec: str) -> str:
    try:
        tags = msgspec.json.decode(spec, type=_OldTags)
    except msgspec.ValidationError as error:
        raise ValueError(f"only the shape with `structures` and `triggers` is supported: {error}") from None
    places = [
        llguidance.StructTag(
            trigger=next((it for it in tags.triggers if tag.begin.startswith(it)), ""),
            begin=tag.begin,
            grammar=json.dumps(tag.schema or {}),
            end=tag.end,
        )
        for tag in tags.structures
    ]
    return llguidance.StructTag.to_grammar(places, assume_special=False)


def _first_line(matcher: llguidance.LLMatcher) -> str:
    """What is wrong, without the library's state that follows it."""
    return matcher.get_error().partition("\n<state>")[0].strip()
