"""Attempts for tests, in one line each. Cards: tests/cards.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from penstock.shapes import Attempt, Sampling


def attempt(
    attempt_id: str = "a.1",
    prompt: int | Sequence[int] = 3,
    sampling: Sampling | None = None,
    *,
    generated: Sequence[int] = (),
    **fields: Any,
) -> Attempt:
    """An attempt at a prompt, or at one of so many tokens. What earlier attempts generated follows it.
    `fields` are the attempt's others and, unless a sampling is given, those of its sampling."""
    token_ids = list(range(prompt) if isinstance(prompt, int) else prompt)
    if sampling is None:
        given = {name: fields.pop(name) for name in Sampling.__struct_fields__ if name in fields}
        sampling = Sampling(**{"max_tokens": 5, **given})
    request_id = attempt_id.partition(".")[0]
    return Attempt(attempt_id, request_id, [*token_ids, *generated], len(token_ids), sampling, **fields)
