"""What an answer must look like, as a mask over the vocabulary for each of its tokens.

llguidance compiles a schema, regular expression or grammar, and computes the masks. A grammar that has been
compiled is kept, since a client sends the same one with each request of a kind.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

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

_ONE_OF: Final[JsonCompileOptions] = {"coerce_one_of": True}
"""`oneOf` counts as `anyOf`, as in xgrammar: a mask cannot keep a text from fitting two schemas at once."""

JSON_OPTIONS: Final[JsonCompileOptions] = {
    **_ONE_OF,
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
"""No free white space: a small model that may write as much of it as it likes often never stops. The
separators are those of Python's json, which chat templates write as well."""

_COMPACT: Final[JsonCompileOptions] = {
    **_ONE_OF,
    "whitespace_flexible": False,
    "item_separator": ",",
    "key_separator": ":",
}

_VALUES: Final = frozenset({"const", "default", "enum", "examples"})
"""Keywords of JSON Schema whose values are no schemas."""

_MAPS: Final = frozenset({"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"})
"""Keywords whose values are schemas by name."""

_OPEN: Final = frozenset({"additionalProperties", "minProperties", "patternProperties"})
_SPREAD: Final = frozenset({"$ref", "anyOf", "if", "not", "oneOf", "unevaluatedProperties"})

_LISTING: Final = re.compile(r"\n(?: +\d+ \| |<state>)")  # what follows the reason in an error

_NO_ESCAPES: Final = str.maketrans("", "", "\\[](){}")
"""Drops what a character may be written with in a regular expression."""

_NO_FORCING: Final = '%llguidance {"no_forcing": true}'

ANY_OBJECT: Final = '{"type": "object"}'


class InvalidGrammar(ValueError):
    """The specification cannot be compiled; says why."""


class _AddedToken(msgspec.Struct):
    content: str


class _TokenizerFile(msgspec.Struct):
    """What is read of tokenizer.json."""

    added_tokens: list[_AddedToken] = []


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
        tokens = msgspec.json.decode(tokenizer_json, type=_TokenizerFile).added_tokens
        self._special_texts = {token.content.translate(_NO_ESCAPES) for token in tokens} - {""}
        self._reasoning_end_id: int | None = None
        if reasoning_end:
            ids = self._tokenizer.tokenize_str(reasoning_end, parse_special=True)
            if len(ids) != 1:
                raise ValueError(f"it has no token {reasoning_end}")
            self._reasoning_end_id = ids[0]
        self._compiled: OrderedDict[tuple[str, str, bool, str], llguidance.LLMatcher] = OrderedDict()

    @property
    def kept(self) -> int:
        """Compiled grammars that are kept now."""
        return len(self._compiled)

    def begin(self, wanted: StructuredOutput) -> AnswerGrammar:
        """For one attempt. Raises InvalidGrammar."""
        key = (wanted.kind, wanted.spec, wanted.disable_any_whitespace, wanted.whitespace_pattern)
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
            if self._names_special_token(wanted.spec):
                grammar = _unforced(grammar)
        except (
            ValueError,
            TypeError,
            KeyError,
            AssertionError,
            RecursionError,
        ) as error:  # whatever the library says so by
            raise InvalidGrammar(f"{wanted.kind}: {error}") from error
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise InvalidGrammar(f"{wanted.kind}: {_reason(matcher)}")
        return matcher

    def _names_special_token(self, spec: str) -> bool:
        """Whether the text of a special token may be in it, as it is or escaped."""
        with contextlib.suppress(ValueError):
            spec = json.dumps(json.loads(spec), ensure_ascii=False)
        spec = spec.translate(_NO_ESCAPES)
        return any(text in spec for text in self._special_texts)


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


class _Part(msgspec.Struct):
    """A grammar in one of two languages."""

    json_schema: msgspec.Raw
    lark_grammar: str | None


class _Compiled(msgspec.Struct):
    """What llguidance makes of a schema or a regular expression."""

    grammars: list[_Part]


def _grammar_of(wanted: StructuredOutput) -> str:
    """In llguidance's language. Raises ValueError and other errors for what is wrong with it."""
    match wanted.kind:
        case "json":
            spec = json.dumps(closed(json.loads(wanted.spec)), ensure_ascii=False)
            return llguidance.LLMatcher.grammar_from_json_schema(spec, _json_options(wanted))
        case "grammar" if "::=" not in wanted.spec:  # vLLM's rule; the library's own misses `?start:`
            return llguidance.LLMatcher.grammar_from_lark(wanted.spec)
        case "json_object":
            return llguidance.LLMatcher.grammar_from_json_schema(ANY_OBJECT, _json_options(wanted))
        case "structural_tag":
            return _of_tags(wanted.spec)
        case kind:
            return llguidance.grammar_from(kind, wanted.spec)


def closed(schema: Any) -> Any:
    """The schema, changed so that what names its properties is an object with no others, as xgrammar does
    unless a schema says what else there may be: a small model that may invent properties often does, and
    never stops. What fits it fits the schema. A schema whose objects are put together of parts stays as
    it is."""
    parts = [schema]
    for part in parts:
        if isinstance(part, list):
            parts += part
        elif isinstance(part, dict):
            for keyword, value in part.items():
                if keyword in _MAPS and isinstance(value, dict):
                    parts += value.values()
                elif keyword not in _VALUES:
                    parts.append(value)
    objects = [part for part in parts if isinstance(part, dict)]
    if any("allOf" in it or ("properties" in it and _SPREAD & it.keys()) for it in objects):
        return schema
    for it in objects:
        names, required = it.get("properties"), it.get("required", ())
        if isinstance(names, dict) and not _OPEN & it.keys() and {*required} <= names.keys():
            it["additionalProperties"] = False
            it.setdefault("type", "object")
    return schema


def _unforced(grammar: str) -> str:
    """The same grammar, of which no text is tokenized ahead. The library does so wherever only one text may
    come, so that the model reads it in the tokens that it was trained on. But it makes a special token of a
    text like `<|im_end|>`, takes that for none that fits the grammar, and the answer ends there."""
    if grammar.startswith("{"):
        (part,) = msgspec.json.decode(grammar, type=_Compiled).grammars
        schema = bytes(part.json_schema).decode()
        grammar = part.lark_grammar if part.lark_grammar is not None else f"start: %json {schema}"
    return f"{grammar}\n{_NO_FORCING}"  # errors count lines from its own first one


def _json_options(wanted: StructuredOutput) -> JsonCompileOptions:
    if wanted.disable_any_whitespace:
        return _COMPACT
    if wanted.whitespace_pattern:
        return {
            **_ONE_OF,
            "whitespace_pattern": wanted.whitespace_pattern,
            "item_separator": ",",
            "key_separator": ":",
        }
    return JSON_OPTIONS


def _of_tags(spec: str) -> str:
    try:
        tags = msgspec.json.decode(spec, type=_OldTags)
    except msgspec.ValidationError as error:
        raise ValueError(f"only the shape with `structures` and `triggers` is supported: {error}") from None
    places = [
        llguidance.StructTag(
            trigger=next((it for it in tags.triggers if tag.begin.startswith(it)), ""),
            begin=tag.begin,
            grammar=json.dumps(closed(tag.schema or {})),
            end=tag.end,
        )
        for tag in tags.structures
    ]
    return llguidance.StructTag.to_grammar(places, assume_special=False)


def _reason(matcher: llguidance.LLMatcher) -> str:
    """What is wrong, without the grammar or the library's state that follows it."""
    return _LISTING.split(matcher.get_error(), maxsplit=1)[0].strip()
