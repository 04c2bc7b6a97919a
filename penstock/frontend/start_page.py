"""GET /: a small page for who opens a frontend's address in a browser."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from shlex import quote
from typing import Final

import msgspec

from penstock import __version__

START_PAGE_TYPE: Final = b"text/html; charset=utf-8"
START_PAGE_HEADERS: Final = ((b"content-security-policy", b"default-src 'none'"),)
"""The page has no script and loads nothing, and browsers hold it to that."""

_LINKS: Final = ("/docs", "/v1/models", "/health", "/metrics", "/version")


def start_page(origin: str, root_path: str, models: Sequence[str], missing: Sequence[str]) -> bytes:
    """The page of a frontend, with the models that it serves and the roles that it misses. `origin` and
    `root_path`: what comes before its paths."""
    served = "".join(f"<li>{escape(name)}</li>" for name in models) or "<li>none yet</li>"
    health = f"missing: {escape(', '.join(missing))}" if missing else "healthy"
    links = " ".join(f'<a href="{escape(root_path + path)}">{path}</a>' for path in _LINKS)
    model = models[0] if models else "MODEL"
    question = {"model": model, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    body = quote(msgspec.json.encode(question).decode())
    chat = quote(origin + root_path + "/v1/chat/completions")
    curl = f"curl {chat} -H 'Content-Type: application/json' -d {body}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Penstock</title>'
        f"<h1>Penstock {__version__}</h1><p>This is an API for programs. Health: {health}.</p>"
        f"<h2>Models</h2><ul>{served}</ul><h2>Try it</h2><pre>{escape(curl)}</pre>"
        f"<p>With API keys, add <code>-H 'Authorization: Bearer KEY'</code>.</p><p>{links}</p></html>\n"
    ).encode()
