"""From the bytes of a body to a struct."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from typing import Any, Final, TypeVar

import msgspec

from penstock.errors import RequestRejected
from penstock.frontend.http.json_limits import check_size

Body = TypeVar("Body", bound=msgspec.Struct)

MAX_HALVES: Final = 10_000
"""Halves of characters that are replaced in a body. One with as many is no valid JSON."""

_HIGH: Final = rb"\\u[dD][89abAB][0-9a-fA-F]{2}"
_LOW: Final = rb"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_HALF: Final = re.compile(rb"%b(?!%b)|(?<!%b)%b" % (_HIGH, _LOW, _HIGH, _LOW))

Explain = Callable[[bytes, msgspec.ValidationError, type[msgspec.Struct]], RequestRejected]
"""Says why a body is not of its kind."""


def decoded(body: bytes, decoder: msgspec.json.Decoder[Body], kind: type[Body], explain: Explain) -> Body:
    """The body as a struct of this kind, which is the decoder's. Raises RequestRejected for what is no JSON
    or too much of it; `explain` makes the error for what is not of this kind."""
    check_size(body)
    body = body.removeprefix(codecs.BOM_UTF8)  # as editors on Windows begin a file
    try:
        try:
            return decoder.decode(body)
        except msgspec.ValidationError as error:
            if "got `float`" not in str(error):
                raise
            return msgspec.convert(with_integers(msgspec.json.decode(body)), kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise explain(body, error, kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        mended = _without_halves(body)
        if mended == body:
            message = f"The body is not valid JSON: {_what_is_wrong(body, error)}"
            raise RequestRejected(message, code="invalid_json") from None
    return decoded(mended, decoder, kind, explain)


def _what_is_wrong(body: bytes, error: Exception) -> str:
    if not body.strip():
        return "it is empty."
    if body.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in body[:2]:
        return "it is UTF-16, and must be UTF-8."
    if isinstance(error, RecursionError):
        return "it is nested too deep."
    # Windows PowerShell sends a text as Latin-1 unless it is told otherwise.
    return "it is not UTF-8." if "UTF-8" in str(error) else str(error)


def _without_halves(body: bytes) -> bytes:
    """The body with U+FFFD in place of each half of a character, such as `\\ud83d` alone. JavaScript writes
    that where a text was cut within an emoji, and a conversation must not end because of it."""
    if b"\0" in body:
        return body
    marked = body.replace(b"\\\\", b"\0\0")  # an escaped backslash is no beginning of another escape
    mended, halves = _HALF.subn(rb"\\ufffd", marked, MAX_HALVES)
    return body if halves in (0, MAX_HALVES) else mended.replace(b"\0\0", b"\\\\")


def with_integers(value: Any) -> Any:
    """The same JSON with 1 for 1.0, which JSON Schema takes for the same number."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [with_integers(item) for item in value]
    if isinstance(value, dict):
        return {key: with_integers(item) for key, item in value.items()}
    return value
