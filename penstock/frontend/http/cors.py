"""Cross-origin requests: which web pages may use the frontend from a browser, and read its answers.

Cookies are never allowed (`Access-Control-Allow-Credentials` is not sent): keys come in headers that a page
sets itself.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

Header = tuple[bytes, bytes]

ANY_ORIGIN: Final = "*"
PREFLIGHT_AGE_S: Final = 600  # how long a browser may keep what it was told

_READABLE: Final = (
    b"access-control-expose-headers",
    b"x-request-id, request-id, retry-after, x-penstock-explanation",
)
_VARIES: Final = (b"vary", b"origin")


def allows(origins: Collection[str], origin: bytes | None) -> bool:
    """Whether a page of this origin may use the frontend."""
    return origin is not None and (ANY_ORIGIN in origins or origin.decode("latin-1") in origins)


def answer_headers(origins: Collection[str], origin: bytes | None) -> list[Header]:
    """What every answer says, errors too."""
    if ANY_ORIGIN in origins:
        return [(b"access-control-allow-origin", b"*"), _READABLE]
    if origin is None or not allows(origins, origin):
        return [_VARIES]
    return [_VARIES, (b"access-control-allow-origin", origin), _READABLE]


def preflight_headers(wanted: bytes | None) -> list[Header]:
    """The rest of the answer to a browser that asks for a page which is allowed. `wanted`: the headers that
    the page would send; clients have many of their own, and none of them is dangerous here."""
    headers = [
        (b"access-control-allow-methods", b"GET, POST, DELETE"),
        (b"access-control-max-age", b"%d" % PREFLIGHT_AGE_S),
    ]
    return headers if wanted is None else [*headers, (b"access-control-allow-headers", wanted)]
