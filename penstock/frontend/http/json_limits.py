"""What JSON may cost beyond its bytes.

Text is cheap: 16 MiB of it in one string are decoded in 10 ms. 16 MiB of `[],[],[]` become 5 million
objects, 500 MB and three seconds in which nobody else gets a token. So values are counted, by the
punctuation outside of strings, before anything is decoded.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any, Final

from penstock.errors import RequestRejected

MAX_VALUES: Final = 1_100_000
"""Values and names in a request body: a prompt of a million token ids fits."""

MAX_CONTAINERS: Final = 100_000
"""Of them, objects and lists: a chat of the most messages has 10,000, a thousand tools some 30,000."""

MAX_DEPTH: Final = 64
"""Of schemas, tools' parameters and template variables: what reads them calls itself for each level, some
of it in engines and in C++, where too deep means the end of a process."""


def check_size(body: bytes) -> None:
    """Raises RequestRejected for a body that would take too long to decode."""
    if len(body) <= MAX_CONTAINERS:
        return
    if _within(body.count(b"[") + body.count(b"{"), body.count(b",")) and body.count(b'"') <= MAX_VALUES:
        return  # wherever they are
    if b"\\" in body:  # leave no quotes but those around strings
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if body.count(b'"') // 2 > MAX_VALUES:
        raise _too_many()
    outside = b"".join(body.split(b'"')[::2])
    if not _within(outside.count(b"[") + outside.count(b"{"), outside.count(b",")):
        raise _too_many()


def check_depth(value: Any, field: str) -> None:
    """Raises RequestRejected for lists and objects within each other to more than MAX_DEPTH."""
    level, depth = _containers([value]), 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise RequestRejected(f"`{field}` is nested to more than {MAX_DEPTH} levels.", field=field)
        inside = [outer.values() if isinstance(outer, dict) else outer for outer in level]
        level = _containers(chain.from_iterable(inside))


def _containers(values: Iterable[Any]) -> list[dict[str, Any] | list[Any]]:
    return [value for value in values if isinstance(value, dict | list)]


def _within(containers: int, commas: int) -> bool:
    return containers <= MAX_CONTAINERS and containers + commas <= MAX_VALUES


def _too_many() -> RequestRejected:
    return RequestRejected(
        f"The body has more than {MAX_VALUES} values, or {MAX_CONTAINERS} objects and lists.",
        code="invalid_json",
    )
