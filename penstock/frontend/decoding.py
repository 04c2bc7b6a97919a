"""From the bytes of a body to a struct."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from penstock.errors import RequestRejected
from penstock.frontend.http.json_limits import check_size

Body = TypeVar("Body", bound=msgspec.Struct)

Explain = Callable[[bytes, msgspec.ValidationError, type[msgspec.Struct]], RequestRejected]
"""Says why a body is not of its kind."""


def decoded(body: bytes, decoder: msgspec.json.Decoder[Body], kind: type[Body], explain: Explain) -> Body:
    """The body as a struct of this kind, which is the decoder's. Raises RequestRejected for what is no JSON
    or too much of it; `explain` makes the error for what is not of this kind."""
    check_size(body)
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
        raise RequestRejected(f"The body is not valid JSON: {error}", code="invalid_json") from None


def with_integers(value: Any) -> Any:
    """The same JSON with 1 for 1.0, which JSON Schema takes for the same number."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [with_integers(item) for item in value]
    if isinstance(value, dict):
        return {key: with_integers(item) for key, item in value.items()}
    return value
