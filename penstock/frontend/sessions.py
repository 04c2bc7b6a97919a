"""Which session of its client a call belongs to, for policies that keep a session on one worker.

A session is named by the first of SESSION_HEADERS that a call has; without one, by what the body has:
`prompt_cache_key` or `session_id` in OpenAI's APIs, `metadata.user_id` in Anthropic's. The router only gets
a hash of the name.
"""

from __future__ import annotations

from typing import Final

from xxhash import xxh3_64_hexdigest

from penstock.errors import RequestRejected
from penstock.frontend.http.exchange import HttpExchange
from penstock.frontend.openai import MAX_SESSION_CHARS
from penstock.frontend.text.tokenizing import Caller
from penstock.frontend.wanted import Wanted

SESSION_HEADERS: Final = (
    "x-session-id",  # of whoever calls; OpenCode sends it as well
    "x-dynamo-session-id",
    "x-claude-code-session-id",
    "session-id",  # Codex
    "session_id",  # Codex, in older versions
)
_HEADERS = [(name, name.encode()) for name in SESSION_HEADERS]


def session_in_headers(exchange: HttpExchange) -> str:
    """The name that the headers give; empty where they give none. Raises RequestRejected."""
    for name, header in _HEADERS:
        given = exchange.header(header)
        if given:
            if len(given) > MAX_SESSION_CHARS:
                message = f"The header `{name}` has more than {MAX_SESSION_CHARS} characters."
                raise RequestRejected(message, field=name)
            return given.decode("latin-1")
    return ""


def session_of(caller: Caller, wanted: Wanted) -> str:
    """What Request.session is. Two tenants' sessions of one name are different ones."""
    name = caller.session or wanted.session
    return xxh3_64_hexdigest(f"{caller.tenant}\0{name}".encode()) if name else ""
